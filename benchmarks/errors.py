"""Errors of attention over several GPUs against float64, beside those of one kernel call on one GPU.

    torchrun --nproc-per-node 4 benchmarks/errors.py --out benchmarks/results/errors.md
    torchrun --nproc-per-node 2 benchmarks/errors.py --tokens 512    # on any machine, in seconds
    torchrun --nproc-per-node 2 benchmarks/errors.py --kinds tree,images,clipped --backends fa4

Error = ‖x − reference‖ / ‖reference‖ over the whole stream. bfloat16 inputs, float64 reference from the same inputs.
Every mesh of the started ranks is run: ring (gather and ring schedules), ulysses, and both. Trees and blocks are also
computed by FlexAttention with a mask of the documents, on one GPU.
"""

import argparse
import platform
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import date
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn import Documents, Layout, Mask, MeshShape, init_mesh, parallel_attention
from ringattn.benchmarking.flex_peer import flex_kernel
from ringattn.benchmarking.workloads import workload
from ringattn.kernels.registry import explain
from ringattn.kernels.spec import CallSpec

HEADS, KEY_HEADS, DIM = 8, 2, 128
TOKENS = 16384


def workloads(tokens: int) -> dict[str, tuple[Documents, Mask]]:
    """By name, of so many tokens or about as many."""
    packed = [max(1, length * tokens // TOKENS) for length in (9001, 3000, 17, 1, 2048, 1300, 640, 377)]
    both = [max(1, length * tokens // TOKENS) for length in (6001, 2000, 17, 1, 174)]
    return {
        f"one document of {tokens}": (Documents([tokens]), Mask()),
        f"window {tokens // 16 - 1}": (Documents([tokens]), Mask(window=(tokens // 16 - 1, 0))),
        f"packed {sum(packed)}": (Documents(packed), Mask()),
        f"bidirectional packed {sum(both)}": (Documents(both), Mask(causal=False)),
        **{
            f"{kind} {tokens}": (found.docs, found.mask)
            for kind in ("tree", "images", "clipped")
            for found in (workload(f"{kind}{tokens}", 0),)
        },
    }


NAMES = ("out", "dq", "dk", "dv")


def inputs(docs: Documents, device: torch.device) -> dict[str, Tensor]:
    """bfloat16 q, k, v and dout of the whole stream, the same on every rank."""
    generator = torch.Generator(device).manual_seed(1)
    heads = {"q": HEADS, "k": KEY_HEADS, "v": KEY_HEADS, "dout": HEADS}
    return {
        name: torch.randn(docs.total, h, DIM, generator=generator, device=device).bfloat16()
        for name, h in heads.items()
    }


def reference(x: dict[str, Tensor], docs: Documents, mask: Mask) -> dict[str, Tensor]:
    """out, dq, dk, dv in float64, head by head and document by document."""
    wide = {name: tensor.double() for name, tensor in x.items()}
    result = {name: torch.zeros_like(wide[source]) for name, source in zip(NAMES, ("q", "q", "k", "v"), strict=True)}
    group = HEADS // KEY_HEADS
    seen = docs.dense(mask)
    for start, size in zip(docs.starts, docs.lengths, strict=True):
        rows = slice(start, start + size)
        allowed = seen[rows, rows].to(wide["q"].device)
        for head in range(HEADS):
            q, k, v = (
                wide[name][rows, h].clone().requires_grad_()
                for name, h in (("q", head), ("k", head // group), ("v", head // group))
            )
            scores = (q @ k.T * DIM**-0.5).masked_fill(~allowed, float("-inf"))
            out = scores.softmax(-1) @ v
            out.backward(wide["dout"][rows, head])
            result["out"][rows, head] = out.detach()
            result["dq"][rows, head] = q.grad
            result["dk"][rows, head // group] += k.grad
            result["dv"][rows, head // group] += v.grad
    return result


def attend(
    x: dict[str, Tensor], layout: Layout, mask: Mask, scheme: str, backend: str, wide: bool
) -> dict[str, Tensor]:
    local = {name: layout.shard(tensor).clone() for name, tensor in x.items()}
    for name in ("q", "k", "v"):
        local[name].requires_grad_()
    out = parallel_attention(
        local["q"], local["k"], local["v"], layout, mask=mask, scheme=scheme, backend=backend, wide_reduce=wide
    )
    out.backward(local["dout"])
    grads = {f"d{name}": local[name].grad for name in ("q", "k", "v")}
    return {name: layout.unshard(tensor) for name, tensor in {"out": out.detach(), **grads}.items()}


def flex(x: dict[str, Tensor], docs: Documents, mask: Mask) -> dict[str, Tensor]:
    """FlexAttention of the whole stream in one process."""
    q, k, v = (x[name].clone().requires_grad_() for name in ("q", "k", "v"))
    out = flex_kernel(docs, mask, DIM**-0.5, q.device)(q, k, v)
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, (q, k, v), x["dout"])), strict=True))


def errors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> list[float]:
    return [((got[name].double() - expected[name]).norm() / expected[name].norm()).item() for name in NAMES]


def meshes(world: int) -> Iterator[tuple[str, int, int, str]]:
    for ulysses in (size for size in range(1, world + 1) if world % size == 0):
        ring = world // ulysses
        schemes = ("gather", "ring") if ring > 1 else ("ulysses",)
        for scheme in schemes:
            yield f"ring {ring} × ulysses {ulysses}, {scheme}", ring, ulysses, scheme


def run(device: torch.device, tokens: int, kinds: Sequence[str], asked: Sequence[str]) -> Iterator[str]:
    """Rows of the table, as they are measured; collective."""
    shapes = {
        (ring, ulysses): init_mesh(ring=ring, ulysses=ulysses) for _, ring, ulysses, _ in meshes(dist.get_world_size())
    }
    spec = CallSpec(device.type, torch.bfloat16, DIM, DIM, HEADS, KEY_HEADS)
    backends = [backend for backend, reason in explain(spec).items() if reason is None and backend != "reference"]
    if asked:
        backends = [backend for backend in backends if backend in asked]
    for name, (docs, mask) in workloads(tokens).items():
        if kinds and name.split()[0] not in kinds:
            continue
        x = inputs(docs, device)
        expected = reference(x, docs, mask)
        for backend in backends:
            single = errors(attend(x, Layout(docs, MeshShape()), mask, "auto", backend, True), expected)
            yield row(name, backend, "one GPU, one call", single, single)
            for label, ring, ulysses, scheme in meshes(dist.get_world_size()):
                layout = Layout(docs, shapes[ring, ulysses])
                for wide in (True, False) if ring > 1 else (True,):
                    got = errors(attend(x, layout, mask, scheme, backend, wide), expected)
                    yield row(name, backend, label + ("" if wide else ", bf16 reduce"), got, single)
        if docs.segmented:
            found = errors(flex(x, docs, mask), expected)
            yield row(name, "FlexAttention, its own mask", "one GPU", found, single)


def row(name: str, backend: str, label: str, got: list[float], single: list[float]) -> str:
    shown = " | ".join(f"{error * 1e3:.3f} ({error / one:.3f})" for error, one in zip(got, single, strict=True))
    return f"| {name} | {backend} | {label} | {shown} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="also write the table to this file")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a stream (default: %(default)s)")
    parser.add_argument("--kinds", default="", help="of workloads, by their first word: tree,images; default: all")
    parser.add_argument("--backends", default="", help="fa4,fa3; default: all that are there")
    arguments = parser.parse_args()
    kinds, asked = ([one for one in text.split(",") if one] for text in (arguments.kinds, arguments.backends))
    path, mesh = arguments.out, init_mesh()
    world = dist.get_world_size()
    device = torch.cuda.get_device_name() if mesh.device.type == "cuda" else "CPU rank"
    head = [
        f"# Errors against float64 on {world} × {device}",
        "",
        f"{date.today()}, torch {torch.__version__}, Python {platform.python_version()}, bfloat16, "
        f"{HEADS} query and {KEY_HEADS} key heads of {DIM}.",
        f"`torchrun --nproc-per-node {world} benchmarks/errors.py`",
        "",
        "Unit 1e-3; in brackets the ratio to one kernel call on one GPU.",
        "",
        "| workload | backend | mesh and schedule | out | dq | dk | dv |",
        "|---|---|---|---|---|---|---|",
    ]
    with ExitStack() as stack:
        file = stack.enter_context(open(path, "w")) if path and dist.get_rank() == 0 else None
        for line in chain(head, run(mesh.device, arguments.tokens, kinds, asked)):
            if dist.get_rank() == 0:
                print(line, flush=True)
            if file is not None:
                print(line, file=file, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
