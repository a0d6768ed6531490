"""Steps captured in CUDA graphs: replays, also among other steps, compute what the same step computes by itself."""

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from ringattn import Documents, Layout, Mask, SequenceMesh
from ringattn.parallel.execution.executor import run
from ringattn.preparation import prepare
from ringattn.settings import AttentionOptions
from tests.dense import Case, dense_attention, relative_error
from tests.parallel.execution.late_transport import late
from tests.parallel.ranks import free_mesh, mesh_of
from tests.pool import Pools

DOCS = Documents([700, 33, 1, 0, 500, 120, 64])
LARGE = Documents([20_000, 4_000])  # whose messages need larger buffers
CASE = Case(DOCS, Mask(), (4, 2), (64, 64), torch.bfloat16)
MESHES = [(2, 1, "gather"), (2, 1, "joint"), (2, 1, "ring"), (1, 2, "ulysses")]


class Step:
    """Forward and backward of an attention whose tensors stay where they are."""

    def __init__(self, layout: Layout, scheme: str, delayed: bool) -> None:
        assert isinstance(layout.mesh, SequenceMesh)
        self.layout, self.scheme, self.delayed = layout, scheme, delayed
        shapes = [(layout.tokens(), heads, 64) for heads in (4, 2, 2, 4)]
        *leaves, self.dout = (torch.zeros(shape, dtype=torch.bfloat16, device=layout.mesh.device) for shape in shapes)
        self.leaves = [x.requires_grad_() for x in leaves]

    def fill(self, tensors: Sequence[Tensor]) -> None:
        """Global ones; a single number for all elements is one too."""
        with torch.no_grad():
            for x, whole in zip((*self.leaves, self.dout), tensors, strict=True):
                x.copy_(self.layout.shard(whole) if whole.dim() else whole)

    def __call__(self) -> list[Tensor]:
        jobs = prepare(*self.leaves, None, self.layout, AttentionOptions(scheme=self.scheme))
        out, _ = run(late(jobs) if self.delayed else jobs, *self.leaves, None)
        return [out.detach(), *torch.autograd.grad(out, self.leaves, self.dout)]


def captured(step: Step) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # the watchdog of NCCL asks for events meanwhile
        results = step()
    return graph, results


def errors(make: Callable[[str], Layout], scheme: str, transport: str, delayed: bool) -> Iterator[float]:
    """Of replays one after another, with steps between them that are not captured, and after buffers have grown."""
    step, between = Step(make(transport), scheme, delayed), Step(make(transport), scheme, delayed)
    layout = step.layout
    device = step.dout.device
    x = {name: tensor.to(device) for name, tensor in CASE.tensors().items()}
    tensors = [x[name] for name in ("q", "k", "v", "dout")]
    expected = dense_attention(CASE, "cuda")
    graph, results = captured(step)
    between.fill([torch.tensor(1.0, device=device)] * 4)

    def replayed(times: int) -> float:
        step.fill([torch.tensor(2.0, device=device)] * 4)
        graph.replay()
        step.fill(tensors)
        for _ in range(times):
            graph.replay()
        return worst(results)

    def worst(found: Sequence[Tensor]) -> float:
        named = zip(("out", "dq", "dk", "dv"), found, strict=True)
        return max(relative_error(layout.unshard(got), expected[name]) for name, got in named)

    yield replayed(1)
    for _ in range(3):
        between()
        yield replayed(2)
        between()
    large = Step(Layout(LARGE, layout.mesh, "zigzag"), "auto", False)
    large()
    yield replayed(1)
    large()
    between.fill(tensors)
    yield worst(between())


def errors_on_a_mesh(ring: int, ulysses: int, scheme: str, transport: str, delayed: bool) -> list[float]:
    def make(transport: str) -> Layout:
        return Layout(DOCS, mesh_of(ring, ulysses, "cuda", transport), "zigzag")

    return list(errors(make, scheme, transport, delayed))


def errors_of_parts(ranks: int, transport: str, delayed: bool) -> list[float]:
    order = sorted(range(len(DOCS)), key=lambda number: -DOCS.lengths[number])
    parts = [((1, ranks), order[:1]), ((ranks, 1), order[1:])]

    def make(transport: str) -> Layout:
        return Layout(DOCS, free_mesh(ranks, "cuda", transport), "zigzag", parts=parts)

    return list(errors(make, "auto", transport, delayed))


@pytest.mark.gpu(2)
@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize("transport", ["collective", "copy"])
@pytest.mark.parametrize(("ring", "ulysses", "scheme"), MESHES)
def test_replays_are_right(pool: Pools, ring: int, ulysses: int, scheme: str, transport: str, delayed: bool) -> None:
    for found in pool(2, "cuda").run(errors_on_a_mesh, ring, ulysses, scheme, transport, delayed, timeout=300):
        assert max(found) <= 5e-3, found


@pytest.mark.gpu(2)
@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize("transport", ["collective", "copy"])
def test_replays_of_parts_are_right(pool: Pools, transport: str, delayed: bool) -> None:
    for found in pool(2, "cuda").run(errors_of_parts, 2, transport, delayed, timeout=300):
        assert max(found) <= 5e-3, found
