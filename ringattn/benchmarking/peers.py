"""Other systems on the same problem: ring-flash-attn, USP (yunchang) and torch's context_parallel.

The first two run the kernel of the run, through `flash_attn_surface`. Each gets its own placement of the same global
tensors, so that what it computes is compared with the kernel alone before it is timed.
"""

import importlib
import importlib.metadata
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from math import lcm
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringattn.benchmarking.contestants import Entry, entry_of, segmented
from ringattn.benchmarking.flash_attn_surface import offered, surface
from ringattn.benchmarking.problem import Problem
from ringattn.kernels.registry import choose
from ringattn.kernels.spec import Range
from ringattn.parallel.layout import Layout
from ringattn.parallel.mesh.shape import MeshShape

DISTRIBUTIONS = ("ring-flash-attn", "yunchang")


def versions() -> list[str]:
    """Name and version of the packages that are installed."""
    found = []
    for name in DISTRIBUTIONS:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache  # what raises is not kept
def ring_flash_attn() -> ModuleType:
    """The package on this process' surface. Raises ImportError, and whatever a package raises that is broken."""
    # Its adapters for transformers import names that transformers 5 does not have. Nothing here needs them.
    adapters = ModuleType("ring_flash_attn.adapters")
    vars(adapters).update(substitute_hf_flash_attn=None, update_ring_flash_attn_params=None)
    return _imported("ring_flash_attn", {adapters.__name__: adapters})


@cache
def yunchang() -> ModuleType:
    """The package on this process' surface; raises as `ring_flash_attn`."""
    return _imported("yunchang", {})


def _imported(name: str, stubs: dict[str, ModuleType]) -> ModuleType:
    if name in sys.modules:
        raise ImportError(f"{name} was imported before, with a kernel of its own")
    with offered(surface().modules | stubs):
        return importlib.import_module(name)


def _absent(load: Callable[[], ModuleType], distribution: str) -> str | None:
    """Why a package is not there, or None."""
    try:
        load()
    except ModuleNotFoundError as error:
        if error.name == distribution.replace("-", "_"):
            return f"{distribution} is not installed: pip install --no-deps {distribution}"
        return f"{distribution} is installed but cannot be imported: {error}"
    except Exception as error:  # a package for another torch raises other errors too
        return f"{distribution} is installed but cannot be imported: {type(error).__name__}: {error}"
    return None


def _lengths(problem: Problem) -> list[int]:
    """Of the documents that have tokens."""
    return [length for length in problem.workload.docs.lengths if length]


def _cumulative(problem: Problem) -> Tensor:
    return torch.tensor([0, *accumulate(_lengths(problem))], dtype=torch.int32, device=problem.device)


def _masked(problem: Problem) -> str | None:
    return segmented(problem) or ("has no windows" if problem.workload.mask.window != (-1, -1) else None)


def _packed(problem: Problem) -> str | None:
    count = len(_lengths(problem))
    return f"has no packed documents, got {count}" if count > 1 else None


def _wide(problem: Problem) -> str | None:
    dtype = problem.tensors[0].dtype
    if dtype in (torch.bfloat16, torch.float16):
        return None
    # The zigzag rings take `x.to(torch.float32)` for a copy, which it is not of float32, and write over their sums.
    return f"takes bfloat16 and float16, got {str(dtype).removeprefix('torch.')}"


def _undivided(problem: Problem, parts: int) -> str | None:
    odd = [length for length in _lengths(problem) if length % parts]
    return f"needs every document to divide by {parts}, got {odd[0]} ({len(odd)} do not)" if odd else None


@dataclass(frozen=True)
class Runs:
    """This rank's ranges of the stream, in an order of its own: a `Layout` reorders the pieces of documents."""

    ranges: tuple[Range, ...]

    @classmethod
    def contiguous(cls, total: int, rank: int, ranks: int) -> "Runs":
        return cls(((rank * total // ranks, (rank + 1) * total // ranks),))

    @classmethod
    def zigzag(cls, lengths: list[int], rank: int, ranks: int) -> "Runs":
        """Every document in 2 × ranks equal slices, of which a rank has one and its mirror, document by document."""
        found, start = [], 0
        for length in lengths:
            size = length // (2 * ranks)
            for index in (rank, 2 * ranks - 1 - rank):
                found.append((start + index * size, start + (index + 1) * size))
            start += length
        return cls(tuple(found))

    def shard(self, x: Tensor) -> Tensor:
        return torch.cat([x[start:stop] for start, stop in self.ranges])

    def indices(self) -> Tensor:
        return torch.cat([torch.arange(start, stop) for start, stop in self.ranges])

    def tokens(self) -> int:
        return sum(stop - start for start, stop in self.ranges)


class RingFlashAttnZigzag:
    """ring-flash-attn's zigzag ring: its dense function for one document, its variable-length one for several."""

    name = "rfa-zigzag"
    peer = True

    def missing(self, problem: Problem) -> str | None:
        refused = _masked(problem) or _undivided(problem, 2 * dist.get_world_size()) or _wide(problem)
        return refused or _absent(ring_flash_attn, "ring-flash-attn")

    def enter(self, problem: Problem) -> Entry:
        surface().backend = choose(problem.spec, problem.backend)
        package, lengths, ranks = ring_flash_attn(), _lengths(problem), dist.get_world_size()
        placed = Runs.zigzag(lengths, dist.get_rank(), ranks)
        leaves, dout = problem.inputs(placed)
        q, k, v = leaves
        cumulative, longest = _cumulative(problem) // ranks, max(lengths) // ranks

        def dense() -> Tensor:
            return package.zigzag_ring_flash_attn_func(q[None], k[None], v[None], causal=True)[0]

        def packed() -> Tensor:
            return package.zigzag_ring_flash_attn_varlen_func(q, k, v, cumulative, longest, causal=True)

        return entry_of(placed, dense if len(lengths) == 1 else packed, leaves, dout)


@dataclass
class RingFlashAttnLlama3:
    """ring-flash-attn's gather of all keys, `heads` key heads at a time (its heads_k_stride); None: all of them.

    Fewer at a time travel while others compute, in more and smaller kernel calls.
    """

    heads: int | None = None
    peer = True

    @property
    def name(self) -> str:
        return "rfa-llama3" if self.heads is None else f"rfa-llama3:{self.heads}"

    def missing(self, problem: Problem) -> str | None:
        total, ranks = problem.workload.docs.total, dist.get_world_size()
        if total % ranks:
            return f"needs tokens that divide by {ranks}, got {total}"
        if problem.heads.key % (self.heads or 1):
            return f"needs key heads that divide by {self.heads}, got {problem.heads.key}"
        return segmented(problem) or _absent(ring_flash_attn, "ring-flash-attn")

    def enter(self, problem: Problem) -> Entry:
        surface().backend = choose(problem.spec, problem.backend)
        package, rank, ranks = ring_flash_attn(), dist.get_rank(), dist.get_world_size()
        placed = Runs.contiguous(problem.workload.docs.total, rank, ranks)
        leaves, dout = problem.inputs(placed)
        prepared = package.llama3_flash_attn_prepare_cu_seqlens(_cumulative(problem), True, rank, ranks)
        keywords: dict[str, Any] = {
            "heads_k_stride": self.heads or problem.heads.key,
            "local_k_slice": prepared[-1],
            "causal": True,
            "window_size": problem.workload.mask.window,
        }

        def attend() -> Tensor:
            return package.llama3_flash_attn_varlen_func(*leaves, *prepared[:-1], **keywords)

        return entry_of(placed, attend, leaves, dout, f"heads_k_stride {keywords['heads_k_stride']}")


class Usp:
    """yunchang's LongContextAttention: its exchange of heads around its zigzag ring, one document only."""

    peer = True

    def __init__(self, ring: int, ulysses: int) -> None:
        self.name = f"usp:{ring}x{ulysses}"
        self.ring, self.ulysses = ring, ulysses
        self._attention: Any = None

    def missing(self, problem: Problem) -> str | None:
        heads = problem.heads
        if heads.query % self.ulysses or heads.key % self.ulysses:
            return f"needs head counts that divide by {self.ulysses}, got {heads.query} and {heads.key}"
        parts = lcm(2 * self.ring, self.ring * self.ulysses)
        refused = _packed(problem) or _masked(problem) or _undivided(problem, parts) or _wide(problem)
        if refused is None and self.ring == 1 and dist.get_backend() == "gloo":
            refused = "sends to itself in a ring of one, which gloo cannot do"
        return refused or _absent(yunchang, "yunchang")

    def enter(self, problem: Problem) -> Entry:
        surface().backend = choose(problem.spec, problem.backend)
        # Of one document that divides, this is its own placement: it deals the halves of a ring position alike.
        mesh = MeshShape(1, self.ring, self.ulysses, dist.get_rank())
        layout = Layout(problem.workload.docs, mesh, policy="zigzag")
        leaves, dout = problem.inputs(layout)
        q, k, v = leaves
        attention = self._made()

        def attend() -> Tensor:
            return attention(q[None], k[None], v[None], causal=True)[0]

        return entry_of(layout, attend, leaves, dout)

    def _made(self) -> Any:
        """Its module, once: it opens process groups. Collective."""
        if self._attention is None:
            package = yunchang()
            package.set_seq_parallel_pg(self.ulysses, self.ring, dist.get_rank(), dist.get_world_size())
            self._attention = package.LongContextAttention(ring_impl_type="zigzag")
        return self._attention


@dataclass
class TorchContextParallel:
    """torch's context_parallel around its own cuDNN attention: no other kernel fits into it.

    `rotation` is how keys come around: "allgather", its default, or "alltoall".
    """

    mesh: DeviceMesh  # of all ranks, one dimension
    rotation: str = "allgather"
    peer = True

    @property
    def name(self) -> str:
        return "torch-cp" if self.rotation == "allgather" else f"torch-cp:{self.rotation}"

    def missing(self, problem: Problem) -> str | None:
        if problem.device.type != "cuda":
            return f"has kernels for CUDA only, got {problem.device.type}"
        parts = 2 * self.mesh.size()
        return _packed(problem) or _masked(problem) or _undivided(problem, parts) or _wide(problem)

    def enter(self, problem: Problem) -> Entry:
        from torch.distributed.tensor.experimental import context_parallel
        from torch.distributed.tensor.experimental._attention import set_rotate_method
        from torch.nn.attention import SDPBackend, sdpa_kernel

        placed = Runs.zigzag(_lengths(problem), self.mesh.get_local_rank(), self.mesh.size())
        flat, flat_dout = problem.inputs(placed)
        # (t, H, D) -> (1, H, t, D), its own shape
        q, k, v, dout = (x.detach().transpose(0, 1)[None].contiguous() for x in (*flat, flat_dout))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        # It is entered once for many layers in a model too. Nothing else here calls the function that it replaces.
        context = ExitStack()
        buffer = torch.zeros(problem.workload.docs.total, device=problem.device)
        context.enter_context(context_parallel(self.mesh, buffers=[buffer], buffer_seq_dims=[0]))

        def attend() -> Tensor:
            set_rotate_method(self.rotation)
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        entry = entry_of(placed, attend, leaves, dout, "its own kernel, cuDNN")

        def forward() -> Tensor:
            return entry.forward()[0].transpose(0, 1)

        def both() -> list[Tensor]:
            return [x[0].transpose(0, 1) for x in entry.both()]

        return replace(entry, forward=forward, both=both, close=context.close)
