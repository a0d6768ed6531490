"""Saved tensors in host memory: the same gradients, memory as a stack, one tensor brought back ahead of its use."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ringattn.memory.offload import HostStack, Offload

CPU = torch.device("cpu")


def layers(count: int, size: int = 8) -> nn.ModuleList:
    torch.manual_seed(0)
    one = [nn.Sequential(nn.Linear(size, size), nn.Tanh(), nn.Linear(size, size)) for _ in range(count)]
    return nn.ModuleList(one).double()


def run(model: nn.ModuleList, x: Tensor, offload: Offload | None, away: int, checkpointed: bool) -> list[Tensor]:
    """Output and gradients; the first layers' tensors go away."""
    h = x = x.clone().requires_grad_()
    for number, layer in enumerate(model):
        plain = (lambda h, layer=layer: h + checkpoint(layer, h, use_reentrant=False)) if checkpointed else layer
        if offload is None:
            h = plain(h)
        else:
            with offload.saving(away=number < away):
                h = plain(h)
    return [h.detach(), *torch.autograd.grad(h.square().sum(), (x, *model.parameters()))]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("away", [0, 1, 3, 5])
def test_gradients_are_the_same(away, checkpointed):
    model, x = layers(5), torch.randn(6, 8, dtype=torch.float64)
    wanted = run(model, x, None, 0, checkpointed)
    offload = Offload(CPU, 2**16, least=1)
    for _ in range(3):
        found = run(model, x, offload, away, checkpointed)
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other)
        assert offload.stack.top == 0
    assert (offload.stack.most > 0) == (away > 0)


def test_nothing_stays_on_the_device_but_what_is_wanted_next():
    model, x = layers(6), torch.randn(6, 8, dtype=torch.float64)
    offload = Offload(CPU, 2**16, least=1)
    here: list[int] = []
    bring = offload._bring

    def counted(kept):
        result = bring(kept)
        here.append(sum(one is not None and one.here is not None for one in (ref() for ref in offload._order)))
        return result

    offload._bring = counted
    run(model, x, offload, 6, True)
    assert here == [1] * 11  # one for each of six layers, and one ahead of five


def test_the_same_tensor_goes_once():
    offload = Offload(CPU, 2**16, least=1)
    x = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    y = x.exp().detach().requires_grad_()
    with offload.saving():
        out = y * y.sin() + y.cos()
    held = {id(ref()) for ref in offload._order}
    assert len(held) == len(offload._order) == 2  # y, and sin(y)
    (gradient,) = torch.autograd.grad(out.sum(), y)
    torch.testing.assert_close(gradient, y.sin() + y * y.cos() - y.sin(), rtol=1e-12, atol=1e-12)


def test_a_graph_that_is_dropped_gives_its_memory_back():
    model, x = layers(3), torch.randn(6, 8, dtype=torch.float64)
    offload = Offload(CPU, 2**12, least=1)
    for _ in range(5):
        with offload.saving():
            out = model[2](model[1](model[0](x)))
        assert offload.stack.top > 0
        del out
        gc.collect()
        assert offload.stack.top == 0


def test_parameters_and_small_tensors_stay():
    offload = Offload(CPU, 2**16)
    weight = nn.Parameter(torch.zeros(1024, 1024))
    small = torch.zeros(8, 8)
    assert offload.pack(weight) is weight
    assert offload.pack(small) is small
    assert offload.stack.top == 0


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5)), max_size=30))
def test_places_of_the_stack_never_overlap(steps):
    """Tensors come and go in any order; whatever is held is never written by another."""
    stack, held = HostStack(2**15, pinned=False), []
    for value, (size, drop) in enumerate(steps):
        place = stack.take(torch.zeros(size))
        place.memory.fill_(value)
        held.append((place, value))
        if drop and held:
            gone, _ = held.pop(-min(drop, len(held)))
            stack.give_back(gone)
        assert all((place.memory == value).all() for place, value in held)
    while held:
        stack.give_back(held.pop()[0])
    assert stack.top == 0


def test_a_full_host_is_an_error_with_the_numbers():
    offload = Offload(CPU, 1000, least=1)
    with pytest.raises(MemoryError, match=r"host_bytes=1000 \(0.0 GiB\) are used up: 0 bytes are taken and 2048 more"):
        offload.pack(torch.zeros(512))
    with pytest.raises(ValueError, match="host_bytes must be >= 0, got -1"):
        Offload(CPU, -1)


def test_all_of_a_layer_come_once_and_before_they_are_asked_for():
    offload = Offload(CPU, 2**16, least=1)
    layers = []
    for layer in range(3):
        offload.next_layer()
        layers.append([offload.pack(torch.full((4,), 10.0 * layer + number)) for number in range(3)])
    copies, early = [], []
    bring = offload._bring

    def counted(kept):
        copies.extend([kept.number] * (kept.here is None))
        return bring(kept)

    offload._bring = counted
    for layer in reversed(range(3)):
        early.append([one.here is not None for one in layers[layer]])
        # As a layer does: its input first, then what it computed.
        for number, one in enumerate(layers[layer]):
            assert torch.equal(offload.unpack(one), torch.full((4,), 10.0 * layer + number))
        if layer:
            beyond = [one.here is not None for earlier in layers[: layer - 1] for one in earlier]
            assert not any(beyond)
    assert sorted(copies) == list(range(9))
    assert early[1:] == [[True] * 3] * 2
