"""Host time of a layer's attention: our own code, with kernels and transfers that do nothing.

    python benchmarks/host.py --out benchmarks/results/host.md
    python benchmarks/host.py --before ../other-checkout     # the same with another checkout's package, in turn

Tiny tensors on the CPU, plans as of a pack of 20 documents. Kernels write nothing and transfers move nothing, so what
is left is what the host does beside launching them: arguments, plan, buffers, views and autograd. Copies and zeros of
tiny tensors stand for launches. On a GPU a launch takes the host a few µs more than such a copy.
"""

import argparse
import cProfile
import json
import os
import platform
import pstats
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from random import Random
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from ringattn import Documents, Layout, parallel_attention
from ringattn.kernels import registry, selftest
from ringattn.kernels.backends.fa3 import FlashAttention3
from ringattn.kernels.backends.fa4 import FlashAttention4
from ringattn.kernels.spec import Backend, Block, Call, Capability, Grads, Options, SavedCall, Sum
from ringattn.parallel.mesh.mesh import SequenceMesh
from ringattn.parallel.plan.route import Route

CALLS = 40  # layer calls of one run, as many as a model has layers
RUNS = 10  # of each process
ROUNDS = 6  # processes of each checkout
WARM_UP = 20


class Null:
    """A backend that adds to sums and writes nothing."""

    name = "null"
    capability = Capability(softcap=True, deterministic=True, adds=True)

    def __init__(self) -> None:
        self._lse: dict[tuple[int, ...], Tensor] = {}

    def missing(self) -> str | None:
        return None

    def forward(self, q: Tensor, *_: Any) -> Tensor:
        rows, heads, _ = q.shape
        if (heads, rows) not in self._lse:
            self._lse[heads, rows] = torch.zeros(heads, rows)
        return self._lse[heads, rows]

    def backward(self, *_: Any) -> None: ...


class NoTransfer:
    """A transport that moves nothing; also what is under way."""

    name, reason = "none", ""

    def buffer(self, route: Route, like: Tensor) -> Tensor:
        return like.new_empty(route.sent)

    def message(self, x: Tensor, route: Route) -> Tensor:
        return x

    def exchange(self, send: Tensor, receive: Tensor, route: Route) -> "NoTransfer":
        return self

    def wait(self) -> None: ...


class NoProcesses:
    """The connections of a mesh of one process that stands for all."""

    closed = False

    def transport(self, axis: str, reason: str) -> NoTransfer:
        return NoTransfer()


class Case(NamedTuple):
    """One rank of a mesh, and the heads and tokens of the pack."""

    name: str
    ring: int
    ulysses: int
    scheme: str
    heads: tuple[int, int]
    tokens: int


CASES = (
    Case("1 rank, 20 documents", 1, 1, "auto", (2, 1), 1024),
    Case("gather, ring 8", 8, 1, "gather", (2, 1), 8192),
    Case("ulysses 8", 1, 8, "ulysses", (16, 8), 1024),
)
DIM = 4


def documents(tokens: int) -> Documents:
    """20 documents, some of them longer than a rank's share."""
    random = Random(0)
    drawn = [random.lognormvariate(0.0, 1.3) for _ in range(20)]
    lengths = [max(1, int(x / sum(drawn) * tokens)) for x in drawn]
    lengths[0] += tokens - sum(lengths)
    return Documents(lengths)


@dataclass
class Layer:
    """A layer's attention on one rank of a case; ready to be called."""

    layout: Layout
    leaves: list[Tensor]
    dout: Tensor
    scheme: str

    @classmethod
    def of(cls, case: Case) -> "Layer":
        rank, connections = 3 % (case.ring * case.ulysses), NoProcesses()
        mesh = SequenceMesh(1, case.ring, case.ulysses, rank, connections=connections)  # type: ignore[arg-type]
        layout = Layout(documents(case.tokens), mesh)
        shapes = [(layout.tokens(), heads, DIM) for heads in (*case.heads, case.heads[1], case.heads[0])]
        *leaves, dout = (torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes)
        return cls(layout, [x.requires_grad_() for x in leaves], dout, case.scheme)

    def forward(self) -> Tensor:
        return parallel_attention(*self.leaves, self.layout, backend="null", scheme=self.scheme)

    def inference(self) -> None:
        with torch.no_grad():
            self.forward()

    def both(self) -> None:
        torch.autograd.grad(self.forward(), self.leaves, self.dout)


@contextmanager
def nothing_computed() -> Iterator[None]:
    """The null backend among the known ones, trusted; rows are not packed, as that is one launch each on a GPU."""
    with ExitStack() as stack:
        known = {**registry.backends(), "null": Null()}
        for target, value in (
            ("ringattn.kernels.registry.backends", lambda: known),
            ("ringattn.kernels.selftest._run", lambda *_: None),
            ("ringattn.kernels.selftest._adds_right", lambda *_: True),
            ("ringattn.parallel.execution.key_transfers.take_rows", lambda *_: None),
            ("ringattn.parallel.execution.key_transfers.add_rows", lambda *_: None),
            ("ringattn.parallel.execution.head_exchange.pack_heads", lambda *_: None),
            ("ringattn.parallel.execution.head_exchange.unpack_heads", lambda *_: None),
        ):
            stack.enter_context(mock.patch(target, value))
        yield
    selftest.forget()


# What the wrapper of FlashAttention-4 relies on in the package, without kernels.
FA4 = """
def _bwd_postprocess_convert(*arguments, **options): ...
def _flash_attn_fwd(q, k, v, **options):
    return q, None
def _flash_attn_bwd(q, k, v, out, dout, lse, dq, dk, dv, cu_seqlens_q=None, cu_seqlens_k=None, **options):
    for x, cu in ((dq, cu_seqlens_q), (dk, cu_seqlens_k), (dv, cu_seqlens_k)):
        _bwd_postprocess_convert(
            q, x, 1.0, cu, None, 90, None, 64, 128, 128, cluster_size=1, hdim_multiple_of=32, fake_mode=False
        )
"""


@contextmanager
def no_packages() -> Iterator[None]:
    """The packages of FlashAttention 3 and 4 replaced by functions that do nothing."""
    interface = ModuleType("null_fa4")
    vars(interface).update({f"name_{number}": number for number in range(150)})  # as many as the package's module has
    exec(FA4, vars(interface))
    arguments = (
        "cu_seqlens_q cu_seqlens_k seqused_k max_seqlen_q max_seqlen_k softmax_scale is_causal softcap out dq dk"
    )
    operators = (lambda *_, **__: (None, None)), (lambda *_, **__: None)
    names = frozenset(f"{arguments} dv window_size_left window_size_right deterministic num_splits".split())
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(sys.modules, null_fa4=interface))
        for target, value in (
            ("ringattn.kernels.backends.fa4._kernels", lambda: (interface._flash_attn_fwd, interface._flash_attn_bwd)),
            ("ringattn.kernels.backends.fa3._kernels", lambda: operators),
            ("ringattn.kernels.backends.fa3.parameters", lambda _: names),
            ("ringattn.kernels.backends.fa4_unpack_triton.unpack_into", lambda *_: None),
        ):
            stack.enter_context(mock.patch(target, value))
        yield


def wrappers() -> dict[str, list[float]]:
    """Times of the FlashAttention 3 and 4 wrappers alone, for a call of 20 blocks."""
    call = Call(tuple(Block((32 * b, 32 * b + 32), (32 * b, 32 * b + 32), -1, 0) for b in range(20)), -1, 0)
    q, k, v, out, dout = (torch.zeros(640, heads, 64, dtype=torch.bfloat16) for heads in (2, 1, 1, 2, 2))
    lse, options = torch.zeros(2, 640), Options(0.125)
    sums = [Sum((0, 640), torch.zeros_like(x, dtype=torch.float32)) for x in (q, k, v)]
    plain, summed = Grads(q, k, v), Grads(q, k, v, (sums[0], sums[1], sums[2]))

    def backward(backend: Backend, grads: Grads) -> Callable[[], None]:
        return lambda: backend.backward(dout, SavedCall(q, k, v, out, lse, call, options), grads)

    found = {}
    with no_packages():
        for backend in (FlashAttention4(), FlashAttention3()):
            step = lambda backend=backend: backend.forward(q, k, v, call, options, out)  # noqa: E731
            found[f"wrapper of {backend.name} | forward"] = microseconds(step)
            found[f"wrapper of {backend.name} | backward"] = microseconds(backward(backend, plain))
        found["wrapper of fa4 | backward into sums"] = microseconds(backward(FlashAttention4(), summed))
    return found


def microseconds(step: Callable[[], Any]) -> list[float]:
    """Of a call, one number per run."""
    for _ in range(WARM_UP):
        step()
    found = []
    for _ in range(RUNS):
        begin = time.perf_counter()
        for _ in range(CALLS):
            step()
        found.append((time.perf_counter() - begin) / CALLS * 1e6)
    return found


def measured() -> dict[str, list[float]]:
    """Times of every case and pass with the package that this process imported."""
    found = {}
    with nothing_computed():
        for case in CASES:
            layer = Layer.of(case)
            found[f"{case.name} | forward"] = microseconds(layer.inference)
            found[f"{case.name} | forward + backward"] = microseconds(layer.both)
    return found | wrappers()


def in_turn(before: str | None) -> list[dict[str, list[float]]]:
    """The times of this checkout, and of another one if there is: processes of both in turn, so that both see the same
    neighbours on this machine. Each runs its own copy of this file, which knows what its package looks like inside."""
    own = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    checkouts = [own] if before is None else [before, own]
    found: list[dict[str, list[float]]] = [{} for _ in checkouts]
    for _ in range(ROUNDS):
        for checkout, times in zip(checkouts, found, strict=True):
            folder = os.path.abspath(checkout)
            command = [sys.executable, os.path.join(folder, "benchmarks", "host.py"), "--json"]
            environment = {**os.environ, "PYTHONPATH": folder}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            for name, runs in json.loads(done.stdout).items():
                times.setdefault(name, []).extend(runs)
    return found


def table(found: list[dict[str, list[float]]]) -> list[str]:
    titles = ["before µs min", "median", "µs min", "median"][-2 * len(found) :]
    lines = [" | ".join(["| case | pass", *titles]) + " |", "|---" * (2 + len(titles)) + "|"]
    for name in found[-1]:
        columns = [f"{number:.0f}" for times in found for number in (min(times[name]), statistics.median(times[name]))]
        lines.append(" | ".join([f"| {name}", *columns]) + " |")
    return lines


def profile(case: Case, rows: int = 22) -> list[str]:
    """Functions by their own time, per layer call. The profiler makes Python functions look slower than they are."""
    with nothing_computed():
        layer = Layer.of(case)
        for _ in range(WARM_UP):
            layer.both()
        profiler = cProfile.Profile()
        profiler.enable()
        for _ in range(CALLS * RUNS):
            layer.both()
        profiler.disable()
    stats: Any = pstats.Stats(profiler)
    lines = ["| function | calls | own µs | with callees µs |", "|---|---|---|---|"]
    entries = sorted(stats.stats.items(), key=lambda item: -item[1][2])
    for (file, line, name), (_, calls, own, whole, _) in entries[:rows]:
        place = name if file == "~" else f"{os.path.basename(file)}:{line} {name}"
        share = 1e6 / (CALLS * RUNS)
        lines.append(f"| `{place}` | {calls / CALLS / RUNS:.1f} | {own * share:.1f} | {whole * share:.1f} |")
    return lines


def commit(checkout: str) -> str:
    command = ["git", "-C", checkout, "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="also write the tables to this file")
    parser.add_argument("--before", help="a checkout whose package is measured too")
    parser.add_argument("--json", action="store_true", help="only the times of this process' package")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.json:
        print(json.dumps(measured()))
        return
    lines = table(in_turn(arguments.before))
    for case in CASES:
        lines += ["", f"## {case.name}: profile of forward + backward", "", *profile(case)]
    head = [
        "# Host time of a layer's attention",
        "",
        f"{date.today()}, {platform.processor() or platform.machine()}, a shared machine of {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, torch {torch.__version__}. `python benchmarks/host.py"
        f"{' --before' if arguments.before else ''}`: {ROUNDS} × {RUNS} runs of {CALLS} calls, kernels and transfers "
        f"that do nothing.{f' `before` is commit {commit(arguments.before)}.' if arguments.before else ''}",
        "",
    ]
    print("\n".join(lines))
    if arguments.out:
        with open(arguments.out, "w") as file:
            file.write("\n".join([*head, *lines]) + "\n")


if __name__ == "__main__":
    main()
