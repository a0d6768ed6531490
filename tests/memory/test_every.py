"""Layers of which every n-th keeps its input: the same gradients, few inputs alive, and refusals by name."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from ringattn.memory.layers import keep_layers
from ringattn.memory.offload import Offload
from tests.pool import Pools

SIZE = 4


class Layer(nn.Module):
    """Counts its calls, draws random numbers and takes more than its input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(SIZE, SIZE, dtype=torch.float64)
        self.calls = 0

    def forward(self, x: Tensor, shift: Tensor, scale: float = 1.0) -> Tensor:
        self.calls += 1
        return x + F.dropout(self.inner(x).tanh(), 0.3) * scale + shift


def layers_of(number: int) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Layer() for _ in range(number))


def gradients(layers: nn.ModuleList, again: bool = False) -> list[Tensor]:
    torch.manual_seed(1)
    x = start = torch.randn(3, SIZE, dtype=torch.float64, requires_grad=True)
    shift = torch.randn(SIZE, dtype=torch.float64, requires_grad=True)
    for number, layer in enumerate(layers):
        x = layer(x, shift, scale=1.0 + number)
    total = x.sin().sum()
    for _ in range(1 + again):
        found = torch.autograd.grad(total, (start, shift, *layers.parameters()), retain_graph=again)
    return [x.detach(), *found]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.integers(1, 8), st.integers(0, 7), st.booleans())
def test_any_number_of_layers_and_any_every(number: int, every: int, away: int, again: bool) -> None:
    layers = layers_of(number)
    wanted = gradients(layers)
    offload = Offload(torch.device("cpu"), 2**16, least=1)
    kept = keep_layers(layers, "layer", offload, min(away, number), every)
    for layer in layers:
        layer.calls = 0
    found = gradients(layers, again)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
    for place, layer in enumerate(layers):
        last = (place + 1) % every == 0 or place == number - 1
        once_more = 1 if last else 2
        assert layer.calls == 1 + once_more * (1 + again)
    kept.undo()
    del found
    assert offload.stack.top == 0


@contextmanager
def watched(layers: nn.ModuleList) -> Iterator[tuple[list[StorageWeakRef], list[int]]]:
    """All inputs that layers were given, and how many of them were alive when each was."""
    seen: list[StorageWeakRef] = []
    alive: list[int] = []

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(StorageWeakRef(args[0].untyped_storage()))
        alive.append(number_of(seen))

    hooks = [layer.inner.register_forward_pre_hook(look) for layer in layers]
    yield seen, alive
    for hook in hooks:
        hook.remove()


def number_of(seen: list[StorageWeakRef]) -> int:
    return len({one.cdata for one in seen if not one.expired()})


@pytest.mark.parametrize("every", [1, 2, 3, 4])
def test_so_many_inputs_are_alive(every: int) -> None:
    layers = layers_of(8)
    keep_layers(layers, "layer", every=every)
    kept = math.ceil(8 / every)
    with watched(layers) as (seen, alive):
        x: Tensor = torch.zeros(3, SIZE, dtype=torch.float64, requires_grad=True) + 1
        for layer in layers:
            x = layer(x, torch.zeros(SIZE, dtype=torch.float64))
        assert number_of(seen) == kept
        alive.clear()
        x.sum().backward()
    # What is kept and, while a chain goes backward, its other inputs, which become fewer.
    assert max(alive) <= kept + every - 1
    assert alive[-1] == 1


def test_no_more_waits_on_the_host_than_the_first_inputs() -> None:
    layers, offload = layers_of(6), Offload(torch.device("cpu"), 2**16, least=1)
    keep_layers(layers, "layer", offload, 4, 2)
    x = torch.zeros(16, SIZE, dtype=torch.float64, requires_grad=True)  # 512 bytes, the least that is taken
    shift = torch.zeros(SIZE, dtype=torch.float64)
    for layer in layers:
        x = layer(x, nn.Parameter(shift))
    assert offload.stack.top == 2 * 512


def run(layers: nn.ModuleList, between: Callable[[int, Tensor], Tensor]) -> None:
    x = torch.zeros(3, SIZE, dtype=torch.float64, requires_grad=True) * 1
    for number, layer in enumerate(layers):
        x = layer(between(number, x), torch.zeros(SIZE, dtype=torch.float64))


def changed_in_place(number: int, x: Tensor) -> Tensor:
    return x.add_(1) if number == 3 else x


@pytest.mark.parametrize("between", [changed_in_place, lambda number, x: x + 1 if number == 3 else x])
def test_a_model_that_changes_hidden_states_between_layers_is_refused(between: Callable[[int, Tensor], Tensor]) -> None:
    layers = layers_of(4)
    keep_layers(layers, "layer", every=2)
    message = r"every=2: layer 3 \(Layer\) gets other hidden states than the layer before it has returned.*use every=1"
    with pytest.raises(NotImplementedError, match=message):
        run(layers, between)
    run(layers, lambda number, x: x + 1 if number == 2 else x)  # the layer keeps this one


def test_layers_that_cannot_be_followed_are_refused() -> None:
    class InPlace(Layer):
        def forward(self, x: Tensor, shift: Tensor, scale: float = 1.0) -> Tensor:
            return x.mul_(2)

    layers = nn.ModuleList([Layer(), InPlace(), Layer()])
    keep_layers(layers, "layer", every=3)
    with pytest.raises(NotImplementedError, match=r"every=3: layer 1 \(InPlace\) changes its input in place"):
        run(layers, lambda _, x: x)
    layers = layers_of(2)
    keep_layers(layers, "layer", every=2)
    x, shift = torch.zeros(3, SIZE, dtype=torch.float64), torch.zeros(SIZE, dtype=torch.float64)
    with pytest.raises(
        NotImplementedError, match="is not given its hidden states as its first argument, without a name"
    ):
        layers[0](x=x, shift=shift)
    with pytest.raises(NotImplementedError, match=r"layer 1 .* gets other hidden states"):
        layers[1](x, shift)


def test_a_layer_that_is_left_out_does_not_count() -> None:
    layers = layers_of(5)

    def found() -> list[Tensor]:
        return gradients(nn.ModuleList(layers[number] for number in (0, 1, 3, 4)))

    wanted = found()
    keep_layers(layers, "layer", every=3)
    for one, other in zip(found(), wanted, strict=True):
        assert torch.equal(one, other)


def test_two_forward_passes_before_their_backward_passes() -> None:
    layers = layers_of(4)

    def total(seed: int) -> Tensor:
        torch.manual_seed(seed)
        x = torch.randn(3, SIZE, dtype=torch.float64)
        for layer in layers:
            x = layer(x, torch.ones(SIZE, dtype=torch.float64))
        return x.square().sum()

    def found() -> list[Tensor]:
        sums = total(1), total(2)
        return [grad for one in sums for grad in torch.autograd.grad(one, list(layers.parameters()))]

    wanted = found()
    keep_layers(layers, "layer", every=2)
    for one, other in zip(found(), wanted, strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_that_comes_later_is_refused() -> None:
    layers = layers_of(2)
    keep_layers(layers, "layer", every=2)
    layers[1].gradient_checkpointing = True
    with pytest.raises(ValueError, match="Layer checkpoints itself already"):
        run(layers, lambda _, x: x)


def test_a_checkpoint_around_a_layer_has_nothing_to_do() -> None:
    class Wrapped(nn.ModuleList):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return checkpoint(self[0], *args, use_reentrant=False, **kwargs)

    layers = layers_of(4)
    wanted = gradients(layers)
    keep_layers(layers, "layer", every=2)
    for layer in layers:
        layer.calls = 0
    for one, other in zip(gradients(nn.ModuleList(Wrapped([layer]) for layer in layers)), wanted, strict=True):
        assert torch.equal(one, other)
    assert [layer.calls for layer in layers] == [3, 2, 3, 2]


# keep, away, every
WAYS: tuple[tuple[Any, int, int], ...] = (
    ("layer", 0, 1), ("attention", 2, 1), ("selective", 0, 1), ("selective", 2, 1), ("layer", 0, 2),
    ("attention", 0, 2), ("attention", 1, 3), ("layer", 3, 3),
)  # fmt: skip


def sharded(engine: str, tile: int | None) -> list[tuple[Any, float]]:
    """For each way: the largest relative error of three steps' losses and of the gradients that an engine reduced."""
    from ringattn import Documents, init_mesh
    from ringattn.hf import parallelize, shard_batch
    from ringattn.memory.tiled_rows import TiledModule
    from tests.memory.test_layers import tiny

    ids = torch.arange(48)[None] * 7 % 61
    mesh = init_mesh(ring=dist.get_world_size())
    batch = shard_batch({"input_ids": ids, "labels": ids}, Documents([30, 1, 17]), mesh)

    def steps(way: Any) -> list[Tensor]:
        model: Any = tiny().float().train()
        parallelize(model, mesh)
        if way is not None:
            keep, away, every = way
            if tile is not None:
                for layer in model.model.layers:
                    TiledModule(layer.mlp, tile)
            offload = Offload(torch.device("cpu"), 2**22, least=1) if away else None
            keep_layers(model.model.layers, keep, offload, away, every)
        return ENGINES[engine](model, batch)

    wanted, out = steps(None), []
    for way in WAYS:
        found = steps(way)
        errors = [float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(found, wanted, strict=True)]
        out.append((way, max(errors)))
    return out


def fsdp2(model: Any, batch: dict[str, Any], reshard: bool = True) -> list[Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh)
    optimizer, out = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(3):
        loss = model(**batch).loss
        loss.backward()
        out.append(loss.detach())
        grads: list[Any] = [p.grad for p in model.parameters()]
        out += [grad.full_tensor().clone() for grad in grads]
        optimizer.step()
        optimizer.zero_grad()
    return out


def zero(model: Any, batch: dict[str, Any], stage: int) -> list[Tensor]:
    from ringattn.training.engines.deepspeed import _import_deepspeed

    deepspeed = _import_deepspeed(torch.device("cpu"))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "overlap_comm": False, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    out: list[Tensor] = []
    for _ in range(3):
        loss = engine(**batch).loss
        engine.backward(loss)
        out.append(loss.detach().clone())
        out += [deepspeed.utils.safe_get_full_grad(p).clone() for p in model.parameters()]
        engine.step()
    engine.destroy()
    return out


ENGINES: dict[str, Callable[[Any, dict[str, Any]], list[Tensor]]] = {
    "fsdp2": fsdp2,
    "fsdp2, weights stay gathered": lambda model, batch: fsdp2(model, batch, False),
    "zero1": lambda model, batch: zero(model, batch, 1),
    "zero3": lambda model, batch: zero(model, batch, 3),
}


CASES = [
    ("fsdp2", None),
    ("fsdp2", 7),
    ("fsdp2, weights stay gathered", None),
    *(
        pytest.param(stage, tile, marks=pytest.mark.slow)
        for stage, tile in [("zero1", 7), ("zero3", None), ("zero3", 7)]
    ),
]


@pytest.mark.parametrize(("engine", "tile"), CASES)
def test_engines_get_the_gradients_that_they_had(pool: Pools, engine: str, tile: int | None) -> None:
    pytest.importorskip("transformers")
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    for rank in pool(2).run(sharded, engine, tile):
        for way, error in rank:
            assert error <= 1e-5, (way, error)
