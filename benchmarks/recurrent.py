"""A layer that carries a state over the ranks of torchrun, beside its kernel on an even share and fla's own split.

    torchrun --nproc-per-node 2 benchmarks/recurrent.py --tokens 65536,262144 --rules delta,mamba2
    torchrun --nproc-per-node 2 benchmarks/recurrent.py --device cpu --tokens 512 --heads 4/2 --dim 16 --rules delta
    torchrun --nproc-per-node 1 benchmarks/recurrent.py --of 2,8      ranks one after another, with nothing sent

Rows, each of forward and backward, the slowest rank's:

- `kernel`: the kernel alone on an even share: a document of tokens / ranks, or the packed documents dealt out evenly.
- `states`: what the scan of one document computes beside it, alone: the maps of the share, and the share's gradient in
  its first state.
- `scan`, `exchange`: ringattn over a balanced layout. `of ceiling` is (kernel + states) / time for one document, the
  kernel's time / time for packed ones. `transfers` is the time in which this rank stood still until its collectives
  had arrived, after all that it computes meanwhile: what they take beside that is not seen.
- `fla.ops.cp`: flash-linear-attention's own split of the delta rule, on contiguous shards, where it is installed, and
  the scan once more, in turns with it.

With `--of` one process takes the part of each rank in turn, over a network that moves nothing, so that a single GPU
shows what a split costs beside its transfers.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ringattn import Documents, Layout, init_mesh
from ringattn.benchmarking.timing import Timer
from ringattn.parallel.machine.shipped import local_machine
from ringattn.parallel.mesh.mesh import SequenceMesh
from ringattn.parallel.mesh.shape import MeshShape
from ringattn.recurrent.exchange import exchange, plan_exchange
from ringattn.recurrent.kernels.contract import Inputs, Kernel, Signature, maps
from ringattn.recurrent.kernels.registry import choose_kernel
from ringattn.recurrent.plan import plan_recurrence
from ringattn.recurrent.price import prices
from ringattn.recurrent.recurrence import shape_of
from ringattn.recurrent.scan import scan
from ringattn.recurrent.wire import Arriving, Here, Wire, wire_of

# Delta rule, decays by key dim, Mamba's steps.
RULES = {
    "delta": (True, False, False),
    "kimi": (True, True, False),
    "mamba2": (False, False, True),
    "lightning": (False, False, False),
    "linear": (False, True, False),
}
PACKED = 2048  # tokens of a document of a pack


class Shape(NamedTuple):
    """Of one layer."""

    rule: str
    heads: int
    key_heads: int
    dim: int
    dtype: torch.dtype


class Row(NamedTuple):
    """One line of the table; milliseconds."""

    workload: str
    what: str
    time: float
    ceiling: float | None
    transfers: float | None


class TimedWire:
    """A network that times how long a rank stands still for its transfers: before each wait the device finishes what it
    was given to compute, so that what is left is the transfer's own."""

    def __init__(self, wire: Wire) -> None:
        self.wire, self.seconds = wire, 0.0

    def timed(self, call: Callable[[], Tensor]) -> Tensor:
        start = _now()
        out = call()
        self.seconds += _now() - start
        return out

    def start(self, send: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Arriving:
        return _TimedArriving(self, self.wire.start(send, sends, receives))

    def exchange(self, send: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        return self.timed(lambda: self.wire.exchange(send, sends, receives))


class _TimedArriving(NamedTuple):
    wire: TimedWire
    arriving: Arriving

    def wait(self) -> Tensor:
        return self.wire.timed(self.arriving.wait)


class Silent:
    """A network that moves nothing: what would arrive is made up."""

    def start(self, send: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Arriving:
        return Here(self.exchange(send, sends, receives))

    def exchange(self, send: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        return 0.01 * torch.randn(sum(receives), *send.shape[1:], dtype=send.dtype, device=send.device)


def _now() -> float:
    """After what this rank computes, while its transfers, which have streams of their own, go on."""
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    return time.perf_counter()


def inputs(tokens: int, shape: Shape, device: torch.device) -> Inputs:
    """Leaves of random rows; gates are float32 as in models."""
    delta, diagonal, steps = RULES[shape.rule]
    K, H, D = shape.key_heads, shape.heads, shape.dim
    generator = torch.Generator(device).manual_seed(1 + dist.get_rank())

    def draw(*sizes: int) -> Tensor:
        return torch.randn(tokens, *sizes, generator=generator, device=device)

    q, k, v = draw(K, D) * D**-0.5, F.normalize(draw(K, D), dim=-1), draw(H, D)
    decay = -0.1 * draw(H, D).abs() if diagonal else -0.1 * draw(H).abs()
    if steps:
        decay = -torch.linspace(0.1, 1.0, H, device=device).expand(tokens, H)
    beta = draw(H).sigmoid().to(shape.dtype) if delta else None
    rows = (q.to(shape.dtype), k.to(shape.dtype), v.to(shape.dtype), decay, beta, draw(H).abs() if steps else None)
    return Inputs(*rows).leaves()  # type: ignore[arg-type]


def both_ways(forward: Callable[[Inputs], Tensor], x: Inputs) -> Callable[[], Any]:
    """A step: outputs, and gradients of all inputs from a fixed gradient."""
    wanted = [one for one in x if one is not None]
    dout = torch.randn(x.v.shape, device=x.v.device).to(x.v.dtype)
    return lambda: torch.autograd.grad(forward(x), wanted, dout)


def states_of(kernel: Kernel, x: Inputs, lengths: tuple[int, ...]) -> Callable[[], Any]:
    """What the scan computes beside a kernel's forward and backward pass."""
    first = torch.zeros(len(lengths), *x.state_shape, dtype=x.wide, device=x.v.device, requires_grad=True)
    dout = torch.randn_like(x.v)

    def step() -> None:
        with torch.no_grad():
            maps(kernel, x, lengths)
        out, _ = kernel.run(x, lengths, first)
        torch.autograd.grad(out, first, dout)

    return step


def flas(x: Inputs, docs: Documents, mesh: SequenceMesh) -> Callable[[], Any] | None:
    """flash-linear-attention's split of the delta rule; None where it has none or is not installed."""
    if x.beta is None or x.decay.dim() == 3 or x.v.device.type != "cuda" or docs.total % mesh.sequence_size:
        return None
    try:
        from fla.ops.cp import build_cp_context
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError:
        return None
    cu_seqlens = torch.tensor(docs.cu_seqlens, device=x.v.device)
    context = build_cp_context(cu_seqlens, mesh.sequence_group, cu_seqlens_cpu=cu_seqlens.cpu())

    def forward(x: Inputs) -> Tensor:
        q, k, v, g, beta = (one[None] for one in x[:5] if one is not None)
        return chunk_gated_delta_rule(q, k, v, g, beta, scale=1.0, cp_context=context)[0][0]

    return both_ways(forward, x)


def runs(peer: Callable[[], Any]) -> bool:
    """Whether another system's step can be done, which is no reason to lose the rows of ours."""
    try:
        peer()
    except Exception as error:
        print(f"fla.ops.cp failed: {error!r:.500}", flush=True)
        return False
    return True


def measured(
    docs: Documents, workload: str, shape: Shape, mesh: SequenceMesh, timer: Timer
) -> Iterator[tuple[str, Row]]:
    """The kernel's name with the rows of one workload, as they are known. Collective."""
    device, ranks = torch.device(timer.device), mesh.sequence_size
    layout = Layout(docs, mesh, "balanced")
    lengths, alone = shares(docs, ranks), len(docs.lengths) == 1
    even, local = inputs(sum(lengths), shape, device), inputs(layout.tokens(), shape, device)
    kernel, wire = choose_kernel(Signature.of(even)), wire_of(mesh)
    plan = plan_recurrence(layout, rounds=prices(layout, shape_of(even))[0].rounds)
    dealt = plan_exchange(layout, (shape.key_heads, shape.heads))
    routes: dict[str, Callable[[Inputs, Wire], Tensor]] = {
        "scan": lambda x, wire: scan(x, plan, kernel, wire),
        "exchange": lambda x, wire: exchange(x, dealt, kernel, wire),
    }
    steps = {name: both_ways(lambda x, route=route: route(x, wire), local) for name, route in routes.items()}  # type: ignore[misc]
    steps["kernel"] = both_ways(lambda x: kernel.outputs(x, lengths), even)
    if alone:  # whole documents are no pieces, and have no states
        steps["states"] = states_of(kernel, even, lengths)

    def waited(name: str) -> float:
        timed = TimedWire(wire)
        both_ways(lambda x: routes[name](x, timed), local)()
        return timed.seconds * 1e3

    ceiling = 0.0
    for group in (["kernel", "states"][: 1 + alone] + ["scan"], ["exchange"]):  # what is not alike compiles for minutes
        for name, took in zip(group, timer.milliseconds([steps[name] for name in group]), strict=True):
            if name in routes:
                yield kernel.name, Row(workload, name, took, ceiling / took, waited(name))
            else:
                ceiling += took
                yield kernel.name, Row(workload, name, took, None, None)
    peer = flas(inputs(docs.total // ranks, shape, device), docs, mesh)
    if peer is not None and runs(peer):
        ours, theirs = timer.milliseconds([steps["scan"], peer])
        yield kernel.name, Row(workload, "scan, again", ours, ceiling / ours, None)
        yield kernel.name, Row(workload, "fla.ops.cp", theirs, ceiling / theirs, None)


def one_by_one(docs: Documents, workload: str, shape: Shape, ranks: int, timer: Timer) -> Iterator[tuple[str, Row]]:
    """The kernel's name, with rows of the kernel and of a scan on `ranks` ranks, of which this process is each in turn:
    the slowest one's time, and that of the kernel beside it."""
    mesh = MeshShape(1, ranks, machine=local_machine(timer.device.type))
    layout = Layout(docs, mesh, "balanced")
    lengths, alone = shares(docs, ranks), len(docs.lengths) == 1
    even = inputs(sum(lengths), shape, timer.device)
    kernel, rounds = choose_kernel(Signature.of(even)), prices(layout, shape_of(even))[0].rounds
    beside = [both_ways(lambda x: kernel.outputs(x, lengths), even)]
    beside += [states_of(kernel, even, lengths)] if alone else []
    slowest = [0.0] * (len(beside) + 1)
    for rank in range(ranks):
        plan, local = plan_recurrence(layout, rank, rounds), inputs(layout.tokens(rank), shape, timer.device)
        part = both_ways(lambda x, plan=plan: scan(x, plan, kernel, Silent()), local)  # type: ignore[misc]
        slowest = max(slowest, timer.milliseconds([*beside, part]), key=lambda times: times[-1])
    *known, took = slowest
    for name, one in zip(("kernel", "states"), known, strict=False):
        yield kernel.name, Row(workload, name, one, None, None)
    yield kernel.name, Row(workload, "scan, nothing sent", took, sum(known) / took, None)


def shares(docs: Documents, ranks: int) -> tuple[int, ...]:
    """Lengths of the documents of an even share."""
    share = docs.total // ranks
    return (share,) if len(docs.lengths) == 1 else (PACKED,) * (share // PACKED) or (share,)


def workloads(tokens: int) -> dict[str, Documents]:
    """One document, and a pack of short ones."""
    short = max(1, min(PACKED, tokens // 8))
    return {f"one of {tokens}": Documents([tokens]), f"{tokens} in {short}s": Documents([short] * (tokens // short))}


def header(shape: Shape, kernel: str, ranks: int) -> list[str]:
    """Of a table in Markdown."""
    return [
        f"{shape.rule} by `{kernel}`, {shape.key_heads} key heads and {shape.heads} value heads of {shape.dim}, "
        f"{str(shape.dtype).removeprefix('torch.')}, {ranks} ranks",
        "",
        "| tokens | what | ms | of ceiling | transfers ms |",
        "|---|---|---:|---:|---:|",
    ]


def line(row: Row) -> str:
    ceiling = "" if row.ceiling is None else f"{row.ceiling:.2f}"
    transfers = "" if row.transfers is None else f"{row.transfers:.2f}"
    return f"| {row.workload} | {row.what} | {row.time:.2f} | {ceiling} | {transfers} |"


def report(
    shape: Shape, tokens: Sequence[int], mesh: SequenceMesh, timer: Timer, of: int | None = None
) -> Iterator[str]:
    """The lines of the table of one rule, as they are measured. Collective.

    Arguments:
        of: ranks that this one takes the part of in turn, with nothing sent; default the mesh as it is.
    """
    told = False
    for count in tokens:
        for name, docs in workloads(count).items():
            found = measured(docs, name, shape, mesh, timer) if of is None else one_by_one(docs, name, shape, of, timer)
            for kernel, row in found:
                yield from () if told else header(shape, kernel, of or mesh.sequence_size)
                yield line(row)
                told = True
    yield ""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", default="65536,262144", help="of the whole stream, several by commas")
    parser.add_argument("--rules", default="delta,mamba2", help=f"of {', '.join(RULES)}")
    parser.add_argument("--heads", default="32/16", help="value and key heads")
    parser.add_argument("--dim", type=int, default=128, help="of keys and values")
    parser.add_argument("--of", default="", help="ranks whose parts run one after another, with nothing sent: 2,8")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args(argv)
    rules = args.rules.split(",")
    if wrong := [rule for rule in rules if rule not in RULES]:
        parser.error(f"--rules must be of {', '.join(RULES)}, got {', '.join(wrong)}")
    heads, key_heads = map(int, args.heads.split("/"))
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    with closing(init_mesh(device_type=args.device)) as mesh:
        timer, tokens = Timer(mesh.device), list(map(int, args.tokens.split(",")))
        for rule, of in product(rules, [int(one) for one in args.of.split(",") if one] or [None]):
            for text in report(Shape(rule, heads, key_heads, args.dim, dtype), tokens, mesh, timer, of):
                if dist.get_rank() == 0:
                    print(text, flush=True)


if __name__ == "__main__":
    main()
