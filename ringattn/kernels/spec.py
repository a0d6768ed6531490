"""The kernel contract: what one call is, what a backend is asked, and what it must answer.

Shapes: T query rows, S key rows, H query heads, K key/value heads (H a multiple of K), D head dim, V value head dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch

Range = tuple[int, int]


@dataclass(frozen=True)
class Block:
    """Query rows over key rows under one band; `left` and `right` are aligned to the bottom right corner.

    With n queries and m keys, query i sees the keys `i + m - n - left ... i + m - n + right`; -1 is open.
    """

    q: Range
    k: Range
    left: int = -1
    right: int = -1


@dataclass(frozen=True)
class Call:
    """One variable-length kernel launch: blocks whose query rows follow one another and whose keys never overlap.

    `q` and `k` are the rows of the tensors that the blocks span together. The blocks' queries tile `q` exactly. Their
    keys ascend inside `k`, perhaps with rows between them that no block reads.
    """

    blocks: tuple[Block, ...]
    left: int = -1
    right: int = -1

    @cached_property
    def q(self) -> Range:
        return self.blocks[0].q[0], self.blocks[-1].q[1]

    @cached_property
    def k(self) -> Range:
        return self.blocks[0].k[0], self.blocks[-1].k[1]

    @cached_property
    def q_lens(self) -> tuple[int, ...]:
        return tuple(block.q[1] - block.q[0] for block in self.blocks)

    @cached_property
    def k_lens(self) -> tuple[int, ...]:
        return tuple(block.k[1] - block.k[0] for block in self.blocks)

    @cached_property
    def k_starts(self) -> tuple[int, ...]:
        """First key row of each block, counted from `k[0]`."""
        return tuple(block.k[0] - self.k[0] for block in self.blocks)

    @cached_property
    def max_q(self) -> int:
        return max(self.q_lens)

    @cached_property
    def max_k(self) -> int:
        return max(self.k_lens)

    @cached_property
    def dense_keys(self) -> bool:
        """Whether the blocks' keys tile `k` exactly, so that cumulative lengths describe them."""
        return self.k_starts == (0, *accumulate(self.k_lens))[:-1]

    @cached_property
    def keyless_rows(self) -> bool:
        """Whether the band leaves some query row without a key: the first of a block, if any of it."""
        pairs = [(n, m) for n, m in zip(self.q_lens, self.k_lens, strict=True) if n]
        return any(m == 0 or (self.right >= 0 and m - n + self.right < 0) for n, m in pairs)

    @cached_property
    def key_runs(self) -> tuple[Range, ...]:
        """The keys that blocks read, as few ranges as there are."""
        runs: list[Range] = []
        for block in self.blocks:
            if block.k[0] == block.k[1]:
                continue
            if runs and runs[-1][1] == block.k[0]:
                runs[-1] = (runs[-1][0], block.k[1])
            else:
                runs.append(block.k)
        return tuple(runs)

    def tensors(self, device: torch.device) -> "CallTensors":
        """The lengths as int32 tensors on `device`, made once: a plan serves every layer of a step."""
        cache: dict[torch.device, CallTensors] = self.__dict__.setdefault("_tensors", {})
        if device not in cache:
            cache[device] = CallTensors(
                _int32((0, *accumulate(self.q_lens)), device),
                _int32((0, *accumulate(self.k_lens)), device),
                _int32((*self.k_starts, self.k[1] - self.k[0]), device),
                _int32(self.k_lens, device),
            )
        return cache[device]

    def packed_key_rows(self, device: torch.device) -> torch.Tensor:
        """Rows of `k` that the blocks read, in order: (sum of k_lens,) int64."""
        cache: dict[torch.device, torch.Tensor] = self.__dict__.setdefault("_packed_rows", {})
        if device not in cache:
            rows = torch.cat(
                [torch.arange(start - self.k[0], stop - self.k[0], device="cpu") for start, stop in self.key_runs]
            )
            cache[device] = to_device(rows, device)
        return cache[device]


class CallTensors(NamedTuple):
    cu_q: torch.Tensor  # (B + 1,) cumulative query lengths
    cu_k: torch.Tensor  # (B + 1,) cumulative key lengths, keys laid end to end
    k_offsets: torch.Tensor  # (B + 1,) first key row of each block in place, then the end
    k_lens: torch.Tensor  # (B,)


def _int32(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return to_device(torch.tensor(values, dtype=torch.int32, device="cpu"), device)


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on `device`, without waiting for it."""
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)  # a pageable copy would wait for the stream


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what partial results of `dtype` are added: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class CallSpec:
    """What a backend is asked whether it can do: everything that changes the mathematics or the memory layout."""

    device: str
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    query_heads: int
    key_heads: int
    window: bool = False
    softcap: float = 0.0
    dropout_p: float = 0.0
    deterministic: bool = False

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the optional features that are asked for; they are fields of `Capability`."""
        asked = {
            "window": self.window,
            "softcap": bool(self.softcap),
            "dropout": bool(self.dropout_p),
            "unequal_head_dims": self.head_dim != self.value_dim,
        }
        return tuple(name for name, wanted in asked.items() if wanted)


@dataclass(frozen=True)
class Capability:
    """What a backend declares that it can do, forward and backward.

    Arguments:
        devices: device types of tensors; empty: any.
        dtypes: empty: every floating dtype.
        max_head_dim: of queries and keys, and of values; None: any. `head_dim_multiple` divides them.
        compute_capability: the lowest CUDA one, and the one above the highest, or None.
        window, softcap, dropout, unequal_head_dims: forward and backward, with exact mathematics.
        deterministic: gradients can be asked to be bitwise equal from run to run; without it such a request only warns.
        adds: gradients can be added to sums before they are rounded (`Grads.sums`).
    """

    devices: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    max_head_dim: int | None = None
    head_dim_multiple: int = 1
    compute_capability: tuple[tuple[int, int], tuple[int, int]] | None = None
    window: bool = True
    softcap: bool = False
    dropout: bool = False
    unequal_head_dims: bool = False
    deterministic: bool = False
    adds: bool = False

    def refusal(self, spec: CallSpec) -> str | None:
        """Why `spec` is outside of what is declared, or None. Looks at the device only for its compute capability."""
        if self.devices and spec.device not in self.devices:
            return f"runs on {' and '.join(self.devices)} tensors only, got {spec.device}"
        if self.dtypes and spec.dtype not in self.dtypes:
            names = " and ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            return f"takes {names}, got {spec.dtype}: cast the model or use autocast"
        for name in spec.features:
            if not getattr(self, name):
                dims = f", got {spec.head_dim} and {spec.value_dim}" if name == "unequal_head_dims" else ""
                return f"has no {name.replace('_', ' ')}{dims}"
        for dim in (spec.head_dim, spec.value_dim):
            if self.max_head_dim is not None and dim > self.max_head_dim:
                return f"takes head dims up to {self.max_head_dim}, got {dim}"
            if dim % self.head_dim_multiple:
                return f"takes head dims that are multiples of {self.head_dim_multiple}, got {dim}"
        return self._wrong_device()

    def _wrong_device(self) -> str | None:
        if self.compute_capability is None:
            return None
        if not torch.cuda.is_available():
            return "needs a CUDA device, and there is none"
        found = torch.cuda.get_device_capability()
        low, high = self.compute_capability
        if not low <= found < high:
            return f"needs compute capability {low[0]}.{low[1]} to below {high[0]}.{high[1]}, got {found[0]}.{found[1]}"
        return None


class Backend(Protocol):
    """A flash kernel. `forward` and `backward` obey one convention whatever the kernel's own.

    - `out` (T, H, V) is written in place; lse (H, T), natural logarithm, float32 (float64 for float64 inputs).
    - Tensors may be views: rows of some of the heads, or columns of a message.
    - A query row without keys has out 0 and lse -inf; in the backward pass its gradients are 0.
    - `backward` takes the out and lse of the *whole* softmax, of which the call may be a part, and writes dq, dk, dv in
      place; key rows that no block reads may hold anything afterwards. A backend that `adds` is also given sums, and
      leaves key rows that no block reads alone.
    """

    name: str
    capability: Capability

    def missing(self) -> str | None:
        """Why the package or operator is not there, or None. Must not raise; a failure may be asked again."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, options: "Options", out: torch.Tensor
    ) -> torch.Tensor:
        """Attention of q (T, H, D) over k (S, K, D), v (S, K, V): rows `call.q` and `call.k`; returns lse (H, T)."""

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        call: Call,
        options: "Options",
        grads: "Grads",
    ) -> None:
        """Gradients of this call's share into `grads`, shaped as q, k, v."""


@dataclass(frozen=True)
class Dropout:
    """Attention dropout of one call, decided by seed and global places, so that no split changes it.

    Arguments:
        p: probability of dropping a probability; the others are divided by 1 - p.
        seed: of this attention, the same on every rank.
        q_index, k_index: (T,), (S,) global index of each row of the call.
        first_head: global number of the call's first query head.
    """

    p: float
    seed: int
    q_index: torch.Tensor
    k_index: torch.Tensor
    first_head: int


@dataclass(frozen=True)
class Options:
    """What is asked of every call of an attention; `dropout` alone differs from call to call."""

    scale: float
    softcap: float = 0.0
    deterministic: bool = False
    dropout: Dropout | None = None


class Sum(NamedTuple):
    """Rows of a gradient that have parts from several calls: the call's is added to `wide` and not written.

    Parts that are rounded before they are added make a sum of many of them 1.2 times as wrong as one call's result.
    A fresh sum holds nothing yet: the call's part, which has all of its rows, is written.
    """

    rows: Range  # of the call's gradient
    wide: torch.Tensor  # (rows, heads, dim) in accumulation precision
    fresh: bool = False

    def add(self, part: torch.Tensor, span: Range, target: torch.Tensor) -> None:
        """Bring `part`, rows `span` of the gradient, home: to the sum, and what lies outside of it to `target`."""
        first, last = max(span[0], self.rows[0]), min(span[1], self.rows[1])
        if first >= last:
            target[slice(*span)] = part
            return
        total, own = self.wide[first - self.rows[0] : last - self.rows[0]], part[first - span[0] : last - span[0]]
        if self.fresh:
            total.copy_(own)
        else:
            total += own
        target[span[0] : first] = part[: first - span[0]]
        target[last : span[1]] = part[last - span[0] :]


@dataclass(frozen=True)
class Grads:
    """Where the gradients of a call go: tensors shaped as q, k and v, and for each the sum of its shared rows."""

    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    sums: tuple[Sum | None, Sum | None, Sum | None] = (None, None, None)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.tensors)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.dq, self.dk, self.dv

    def deliver(self, which: int, part: torch.Tensor, span: Range) -> None:
        """Write rows `span` of dq (0), dk (1) or dv (2), or add those that are part of a sum."""
        target, total = self.tensors[which], self.sums[which]
        if total is None:
            target[slice(*span)] = part
        else:
            total.add(part, span, target)
