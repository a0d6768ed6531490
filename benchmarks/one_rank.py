"""One rank of many on one GPU: all that a rank does but the transfers, beside the bare kernel on its share of heads.

    python benchmarks/one_rank.py --ranks 8 --workloads hist64k,short256k --out benchmarks/results/one-rank.md

Every rank's part of a plan runs alone, one after another, with a transport that moves nothing. So the share of the
kernel that is left is what a schedule would reach if everything that travels were hidden: it shows what copies, cut
documents, imbalance and launches cost, on a machine with a single GPU. Times are of forward and backward, the slowest
rank. `busy` is the time in which a kernel ran, `launches` their number, `host` the time that the host takes to issue
them; where host exceeds busy the GPU waits for it. `replay` is the time of the same step captured in a CUDA graph; its
share is of the bare kernel captured as well.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import date
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringattn import Layout, parallel_attention
from ringattn.benchmarking.captured import Graphs
from ringattn.benchmarking.contestants import Silent
from ringattn.benchmarking.problem import Heads, spec_of
from ringattn.benchmarking.workloads import Workload, workload
from ringattn.kernels.registry import choose
from ringattn.kernels.spec import Grads, Options, SavedCall
from ringattn.parallel.machine.shipped import local_machine
from ringattn.parallel.mesh.mesh import SequenceMesh
from ringattn.parallel.mesh.shape import MeshShape
from ringattn.parallel.plan.exchange import exchange_plan
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.planning.planner import plan_attention
from ringattn.settings import AttentionOptions

CALLS, REPEATS = 4, 3


class Measured(NamedTuple):
    """Milliseconds of a step, and of the host; those in which a kernel ran, and the number of launches; those of a
    replay of the captured step."""

    step: float
    host: float
    busy: float
    launches: int
    replay: float


def measured(step: Callable[[], Any], arrived: Sequence[Tensor] = ()) -> Measured:
    """`step` is called as a model's layers follow one another.

    Arguments:
        arrived: where its transport would have received something, once it is captured.
    """
    took, host = timed(step)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    events = [one for one in profile.events() if one.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(one.device_time for one in events) / 1e3
    with closing(Graphs()) as graphs:
        graph = graphs.record(step).graph
        for x in arrived:  # kernels take another time of zeros
            x.normal_()
        graph.replay()
        replay, _ = timed(graph.replay)
    return Measured(took, host, busy, len(events), replay)


def timed(step: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds of a step, and those that the host takes to issue it."""
    steps, hosts = [], []
    for _ in range(REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        began = time.perf_counter()
        begin.record()
        for _ in range(CALLS):
            step()
        end.record()
        hosts.append((time.perf_counter() - began) * 1e3 / CALLS)
        torch.cuda.synchronize()
        steps.append(begin.elapsed_time(end) / CALLS)
    return statistics.median(steps), min(hosts)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def alone(work: Workload, heads: Heads, ranks: int, backend: str) -> Measured:
    """The bare kernel on the first rank's even share of the heads."""
    total = work.docs.total
    share = exchange_plan(((0, total),) * ranks, heads.query, heads.key, 0).heads[0]
    own = Heads(share.queries, len(share.keys), heads.dim)
    kernel, options = (
        choose(spec_of(work, own, torch.device("cuda"), torch.bfloat16), backend),
        Options(heads.dim**-0.5),
    )
    shape = Shape(own.query, own.key, own.dim, own.dim)
    calls = plan_attention(Layout(work.docs, MeshShape()), shape, AttentionOptions(work.mask)).stages[0].calls
    q, out, dout, dq = (random(total, own.query, heads.dim) for _ in range(4))
    k, v, dk, dv = (random(total, own.key, heads.dim) for _ in range(4))

    def step() -> None:
        for call in calls:
            rows, keys = slice(*call.q), slice(*call.k)
            lse = kernel.forward(q[rows], k[keys], v[keys], call, options, out[rows])
            target = Grads(dq[rows], dk[keys], dv[keys])
            saved = SavedCall(q[rows], k[keys], v[keys], out[rows], lse, call, options)
            kernel.backward(dout[rows], saved, target)

    for _ in range(3):
        step()
    return measured(step)


def mesh_of(degrees: tuple[int, int], rank: int, transport: Silent) -> SequenceMesh:
    """One rank's mesh without processes."""
    machine = local_machine("cuda").by_copy_engines()
    connections: Any = SimpleNamespace(closed=False, transport=lambda axis, reason: transport)
    return SequenceMesh(1, *degrees, rank, machine=machine, device_type="cuda", connections=connections)


def one_rank(work: Workload, heads: Heads, contestant: str, rank: int, backend: str) -> tuple[Measured, str]:
    """What a rank does, without transfers, and on which degrees its documents are.

    Arguments:
        contestant: `<scheme>:<ring>x<ulysses>`, or `auto:<ranks>` for degrees that the documents choose.
    """
    scheme, degrees = contestant.split(":")
    transport = Silent(True, [])
    if "x" in degrees:
        ring, ulysses = map(int, degrees.split("x"))
        mesh = mesh_of((ring, ulysses), rank, transport)
    else:
        every = tuple(mesh_of(pair, rank, transport) for pair in MeshShape(1, int(degrees)).parted())
        mesh = replace(every[0], alternatives=every)
    layout = Layout(work.docs, mesh, mask=work.mask, heads=(heads.query, heads.key), head_dim=heads.dim)
    leaves = [
        random(layout.tokens(), count, heads.dim).requires_grad_() for count in (heads.query, heads.key, heads.key)
    ]
    dout = random(layout.tokens(), heads.query, heads.dim)

    def step() -> None:
        q, k, v = leaves
        out = parallel_attention(q, k, v, layout, mask=work.mask, scheme=scheme, backend=backend)
        torch.autograd.grad(out, leaves, dout)

    for _ in range(3):
        step()
    transport.filling = False
    step()
    parts = [f"{len(part.docs)} on {part.mesh.ring} × {part.mesh.ulysses}" for part in layout.parts]
    return measured(step, transport.arrived), ", ".join(parts)


def rows_of(name: str, arguments: argparse.Namespace) -> list[str]:
    """The lines of one workload."""
    query, key = map(int, arguments.heads.split("/"))
    heads, work, ranks = Heads(query, key, arguments.head_dim), workload(name, arguments.seed), arguments.ranks
    ceiling = alone(work, heads, ranks, arguments.backend)
    lines = [_line(name, "kernel alone", [ceiling], ceiling)]
    for one in arguments.contestants.split(","):
        found = [one_rank(work, heads, one, rank, arguments.backend) for rank in range(0, ranks, arguments.every)]
        lines.append(_line(name, one, [measured for measured, _ in found], ceiling, found[0][1]))
    return lines


def _line(name: str, contestant: str, found: list[Measured], ceiling: Measured, parts: str = "") -> str:
    slowest = max(found)
    mean = statistics.mean(one.step for one in found)
    numbers = f"{slowest.step:.3f} | {mean:.3f} | {slowest.busy:.3f} | {slowest.host:.3f} | {slowest.launches}"
    replay = max(one.replay for one in found)
    shares = f"{ceiling.step / slowest.step:.3f} | {replay:.3f} | {ceiling.replay / replay:.3f}"
    return f"| {name} | {contestant} | {numbers} | {shares} | {parts} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--workloads", default="hist64k,short256k,hist256k,packed256k,dense64k")
    parser.add_argument("--contestants", default="auto:8,gather:8x1,ulysses:1x8", help="<scheme>:<ring>x<ulysses>, ...")
    parser.add_argument("--every", type=int, default=1, help="measure only every n-th rank")
    parser.add_argument("--heads", default="32/8")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--out", help="also write the table to this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    lines = [
        f"# One of {arguments.ranks} ranks without transfers, {torch.cuda.get_device_name()}",
        "",
        f"{date.today()}; torch {torch.__version__}; bfloat16, {arguments.heads} heads of {arguments.head_dim}, "
        f"backend {arguments.backend}, seed {arguments.seed}. `python benchmarks/one_rank.py --ranks {arguments.ranks} "
        f"--workloads {arguments.workloads} --contestants {arguments.contestants}`",
        "",
        "Forward and backward of the slowest rank (mean: of all ranks), milliseconds. Replay: of the step captured in "
        "a CUDA graph; its share is of the kernel alone captured as well.",
        "",
        "| workload | contestant | step | mean | busy | host | launches | share of the kernel alone "
        "| replay | share of the captured kernel | documents |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for name in arguments.workloads.split(","):
        lines += rows_of(name, arguments)
        print("\n".join(lines[-1 - len(arguments.contestants.split(",")) :]), flush=True)
    if arguments.out:
        with open(arguments.out, "w") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
