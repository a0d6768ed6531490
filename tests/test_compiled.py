"""Compiled layers whose layouts nobody keeps: a graph holds what its backward pass needs, and no longer."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._functorch import config as functorch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from ringattn import Documents, Layout, Mask, MeshShape, ParallelAttention, parallel_attention
from ringattn.numbered import by_number
from ringattn.settings import AttentionOptions
from tests.compiled_layers import Layer, compiled_and_not
from tests.parallel.ranks import mesh_of
from tests.pool import Pools

Refs = list[weakref.ref[Any]]


class Steps:
    """Losses of a layer whose layouts nobody keeps, compiled and not."""

    def __init__(self, mesh: MeshShape, wrap: Callable[[nn.Module], Any], backend: str = "aot_eager") -> None:
        torch._dynamo.reset()
        self.mesh, self.layer = mesh, Layer(ParallelAttention(mesh))
        self.runs = wrap(self.layer), wrap(torch.compile(self.layer, fullgraph=True, backend=backend))
        self.held: Refs = []

    def loss(self, lengths: list[int], fast: bool = True) -> tuple[Tensor, Tensor]:
        """The loss and its input; the layout's last reference outside of the graph goes on return."""
        layout = Layout(Documents(lengths), self.mesh)
        self.held += [weakref.ref(layout), weakref.ref(by_number(layout._number))]
        x = torch.randn(layout.docs.total, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        leaf = layout.shard(x).clone().requires_grad_()
        return self.runs[fast](leaf, layout).square().sum(), leaf

    def grads(self, leaf: Tensor) -> list[Tensor]:
        found = [leaf.grad, *(p.grad for p in self.layer.parameters())]
        self.layer.zero_grad()
        leaf.grad = None
        return [grad for grad in found if grad is not None]

    def gradients(self, lengths: list[int], fast: bool = True) -> list[Tensor]:
        loss, leaf = self.loss(lengths, fast)
        loss.backward()
        return self.grads(leaf)

    @property
    def alive(self) -> int:
        return sum(ref() is not None for ref in self.held)


WRAPS: dict[str, Callable[[nn.Module], Any]] = {
    "plain": lambda layer: layer,
    "checkpoint": lambda layer: lambda *args: checkpoint(layer, *args, use_reentrant=False),
    "reentrant checkpoint": lambda layer: lambda *args: checkpoint(layer, *args, use_reentrant=True),
}
BATCHES = [[40, 3, 21], [64], [13, 80, 7], [90, 10]]


@pytest.fixture
def counted() -> Iterator[None]:
    """Without the garbage collector: memory that plans hold must not wait for it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def dropped(ring: int, ulysses: int) -> list[tuple[list[Tensor], list[Tensor], int]]:
    steps = Steps(mesh_of(ring, ulysses), WRAPS["plain"])
    batches = []
    for lengths in BATCHES:
        found, expected = steps.gradients(lengths), steps.gradients(lengths, fast=False)
        gc.collect()  # of a worker that ran other tests before; below it is off
        batches.append((found, expected, steps.alive))
    return batches


@pytest.mark.parametrize(("ring", "ulysses"), [(2, 1), (1, 2)])
def test_backward_after_the_batch_is_dropped(pool: Pools, ring: int, ulysses: int) -> None:
    for batches in pool(2).run(dropped, ring, ulysses):
        for found, expected, alive in batches:
            assert alive == 0
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("wrap", "backend"),
    [*((wrap, "aot_eager") for wrap in WRAPS), pytest.param("plain", "inductor", marks=pytest.mark.slow)],
)
def test_no_layout_outlives_its_graph(counted: None, wrap: str, backend: str) -> None:
    steps = Steps(MeshShape(), WRAPS[wrap], backend)
    for lengths in BATCHES * 2:
        found, expected = steps.gradients(lengths), steps.gradients(lengths, fast=False)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert steps.alive == 0
    loss, _ = steps.loss([20, 5])
    assert steps.alive > 0
    del loss  # freed without a backward pass
    assert steps.alive == 0


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_batches_in_flight(counted: None, order: tuple[int, int]) -> None:
    steps = Steps(MeshShape(), WRAPS["plain"])
    expected = [steps.gradients(lengths, fast=False) for lengths in BATCHES[:2]]
    flying = {number: steps.loss(BATCHES[number]) for number in (0, 1)}
    for number in order:
        loss, leaf = flying.pop(number)
        loss.backward()
        for a, b in zip(steps.grads(leaf), expected[number], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        del loss, leaf
        assert steps.alive == len(flying)
    assert not flying


def test_a_retained_graph_keeps_its_layout(counted: None) -> None:
    with functorch.patch(donated_buffer=False):  # which torch asks for
        steps = Steps(MeshShape(), WRAPS["plain"])
        loss, leaf = steps.loss(BATCHES[0])
        loss.backward(retain_graph=True)
        first = steps.grads(leaf)
        loss.backward()
        assert all(torch.equal(a, b) for a, b in zip(first, steps.grads(leaf), strict=True))
        del loss
    assert steps.alive == 0


def test_a_checkpoint_inside_of_a_graph_is_computed_again(counted: None) -> None:
    steps = Steps(MeshShape(), WRAPS["plain"])
    inside = torch.compile(WRAPS["checkpoint"](steps.layer), fullgraph=True, backend="aot_eager")
    steps.runs = steps.layer, inside
    for lengths in BATCHES:
        for a, b in zip(steps.gradients(lengths), steps.gradients(lengths, fast=False), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert steps.alive == 0


def test_hooks_that_copy_what_is_saved_are_told_about() -> None:
    """They lose what a tensor keeps alive: exact as long as the caller holds the batch, and else an error."""
    steps = Steps(MeshShape(), WRAPS["plain"])
    with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, lambda x: x):
        loss, _ = steps.loss(BATCHES[0])
        with pytest.raises(RuntimeError, match="its tensor was copied"):
            loss.backward()
        layout = Layout(Documents(BATCHES[0]), MeshShape())
        leaf = torch.randn(64, 32, dtype=torch.float64, requires_grad=True)
        steps.runs[1](leaf, layout).sum().backward()
    found = steps.grads(leaf)
    steps.runs[0](leaf, layout).sum().backward()
    for a, b in zip(found, steps.grads(leaf), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def heads_of(layout: Layout) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(layout.docs.total, heads, 8) for heads in (4, 2, 2)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


def test_a_layout_of_inference_mode_is_trained_with() -> None:
    torch._dynamo.reset()
    with torch.inference_mode():
        layout = Layout(Documents([20, 5]), MeshShape())
    compiled = torch.compile(parallel_attention, fullgraph=True, backend="aot_eager")
    results = []
    for run in (parallel_attention, compiled):
        q, k, v = heads_of(layout)
        run(q, k, v, layout).square().sum().backward()
        results.append([q.grad, k.grad, v.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_dropout_is_exact_outside_of_the_graph_and_refused_inside() -> None:
    layout = Layout(Documents([20, 5]), MeshShape())
    attention = ParallelAttention(MeshShape(), dropout_p=0.5, backend="reference")
    torch._dynamo.reset()
    broken = torch.compile(attention, backend="aot_eager")
    for seed in range(3):
        results = []
        for run in (attention, broken):
            q, k, v = heads_of(layout)
            run(q, k, v, layout, dropout_seed=seed).square().sum().backward()
            results.append([q.grad, k.grad, v.grad])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="attention dropout, whose seed"):
        torch.compile(attention, backend="aot_eager", fullgraph=True)(*heads_of(layout), layout, dropout_seed=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layout": None}, "layout must be a Layout, got NoneType"),
        ({"layout": MeshShape()}, "layout must be a Layout, got MeshShape"),
        ({"mask": "causal"}, "mask must be a Mask, got str"),
        ({"softmax_scale": torch.tensor(0.5)}, "softmax_scale must be a number, which has no gradient, got Tensor"),
        ({"backend": "nope"}, "backend must be auto or one of"),
        ({"layout": Layout(Documents([7]), MeshShape())}, "q must hold the 7 tokens"),
    ],
)
def test_a_compiled_call_names_what_is_wrong(changes: dict[str, Any], words: str) -> None:
    layout = Layout(Documents([20, 5]), MeshShape())
    q, k, v = heads_of(layout)
    torch._dynamo.reset()
    with pytest.raises((ValueError, torch._dynamo.exc.Unsupported), match=words):
        torch.compile(parallel_attention, backend="aot_eager", fullgraph=True)(q, k, v, **{"layout": layout} | changes)


@pytest.mark.parametrize(("fullgraph", "dropout"), [(True, 0.0), (False, 0.5)])
def test_a_compiled_attention_refuses_layouts_of_other_meshes(fullgraph: bool, dropout: float) -> None:
    attention = ParallelAttention(MeshShape(), dropout_p=dropout)
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=fullgraph)
    layout = Layout(Documents([25]), MeshShape(data=2))
    with pytest.raises(
        ValueError, match=r"layout was made for MeshShape\(data=2.*this attention for MeshShape\(data=1"
    ):
        compiled(*heads_of(layout), layout, dropout_seed=0)


@pytest.mark.parametrize("sinks", [False, True])
def test_the_operators_are_what_they_declare(sinks: bool) -> None:
    """Schema, fake results, strides and gradients, as torch checks them."""
    import ringattn.compiled  # noqa: F401  declares them

    layout = Layout(Documents([20, 5]), MeshShape())
    logits = torch.randn(4, dtype=torch.float64, requires_grad=True) if sinks else None
    options = AttentionOptions(Mask(window=(9, 0)), keep_keys=False, return_lse=True)
    inputs = (*heads_of(layout), logits, layout._number, *options.to_constants(), [])
    opcheck(torch.ops.ringattn.attend.default, inputs)
    plain = tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)
    results = torch.ops.ringattn.attend.default(*plain)
    opcheck(torch.ops.ringattn.attend_backward.default, (torch.ones_like(results[0]), *results, *plain))


def on_mesh(ring: int, ulysses: int, sinks: bool, window: tuple[int, int]) -> tuple[list, int]:
    mesh = mesh_of(ring, ulysses)
    logits = nn.Parameter(torch.randn(4, dtype=torch.float64)) if sinks else None
    layouts = [Layout(Documents(lengths), mesh) for lengths in ([40, 3, 21], [64], [13, 80, 7], [90, 10])]
    return compiled_and_not(layouts, ParallelAttention(mesh, mask=Mask(window=window), sinks=logits))


@pytest.mark.parametrize(
    ("ring", "ulysses", "sinks", "window"),
    [*((*degrees, True, (9, 0)) for degrees in ((1, 1), (2, 1), (1, 2), (2, 2))), (2, 2, False, (-1, -1))],
)
def test_a_layer_is_one_graph_for_all_lengths(
    pool: Pools, ring: int, ulysses: int, sinks: bool, window: tuple[int, int]
) -> None:
    for pairs, graphs in pool(ring * ulysses).run(on_mesh, ring, ulysses, sinks, window):
        assert graphs <= 2  # the first, and one for any number of tokens
        for eager, compiled in pairs:
            for a, b in zip(eager, compiled, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_compiled_layer_follows_autocast(mixed: bool) -> None:
    """Also where rotated queries and keys are wide and values narrow."""
    layout = Layout(Documents([20, 5]), MeshShape())
    q, k, v = (torch.randn(25, 2, 8, generator=torch.Generator().manual_seed(0)) for _ in range(3))
    v = v.bfloat16() if mixed else v

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return parallel_attention(q, k, v, layout)

    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        eager, fast = attend(q, k, v), torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v)
    assert eager.dtype == fast.dtype == torch.bfloat16
    assert torch.equal(eager, fast)
