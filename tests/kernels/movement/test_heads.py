"""Packing heads for an exchange and back: plain copies and the Triton kernels against indexing."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn.kernels.movement.heads import pack_heads, unpack_heads
from ringattn.kernels.movement.slots import Slot, Slots
from tests.kernels.interpreter import interpreted, run_interpreted, starts_the_interpreter


class Packed(NamedTuple):
    tensors: list[torch.Tensor]  # views of larger ones
    slots: Slots
    message: torch.Tensor  # as it is right; 7 where nothing is


@st.composite
def cases(draw: st.DrawFn) -> Packed:
    """Heads of up to three tensors in rows of some messages, end to end; a head may be in several."""
    rows, seed = draw(st.integers(1, 70)), draw(st.integers(0, 9))
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for _ in range(draw(st.integers(1, 3))):
        heads, dim = draw(st.integers(1, 3)), draw(st.sampled_from([1, 8, 12, 64, 128]))
        tensors.append(torch.randn(rows, heads + 1, dim + 8, generator=generator)[:, 1:, :dim])
    all_heads = [(number, head) for number, x in enumerate(tensors) for head in range(x.shape[1])]
    more = draw(st.lists(st.sampled_from(all_heads), max_size=3))
    begin = draw(st.sampled_from([0, 5, 16]))
    slots, parts = [], [torch.full((begin,), 7.0)]
    for held in (all_heads, more):
        stride = sum(tensors[number].shape[2] for number, _ in held) + draw(st.sampled_from([0, 3, 8]))
        message, column = torch.full((rows, stride), 7.0), 0
        for number, head in held:
            dim = tensors[number].shape[2]
            message[:, column : column + dim] = tensors[number][:, head]
            slots.append(Slot(number, head, begin + column, stride))
            column += dim
        parts.append(message.flatten())
        begin += message.numel()
    return Packed(tensors, Slots(tuple(slots)), torch.cat(parts))


def check_unpacked(case: Packed, targets: list[torch.Tensor]) -> None:
    for number, (x, target) in enumerate(zip(case.tensors, targets, strict=True)):
        for head in range(x.shape[1]):
            total = torch.zeros_like(x[:, head])
            for _ in case.slots.by_head[number, head]:
                total += x[:, head]
            assert torch.equal(target[:, head].cpu(), total)


@given(case=cases())
def test_heads_are_where_the_slots_say(case: Packed) -> None:
    message = torch.full_like(case.message, 7.0)
    pack_heads(case.tensors, message, case.slots)
    assert torch.equal(message, case.message)
    targets = [torch.full_like(x, 5.0) for x in case.tensors]
    unpack_heads(message, targets, case.slots)
    check_unpacked(case, targets)


def test_sums_of_a_head_are_rounded_once() -> None:
    slots = Slots((Slot(0, 0, 0, 1), Slot(0, 0, 1, 1), Slot(0, 0, 2, 1)))
    target = torch.zeros(1, 1, 1, dtype=torch.bfloat16)
    unpack_heads(torch.tensor([1.0, 2.0**-8, 2.0**-8]), [target], slots)
    assert target.item() == 1.0 + 2.0**-7


@pytest.mark.gpu
@given(case=cases())
def test_heads_are_packed_by_triton_on_a_device(case: Packed) -> None:
    message = torch.full_like(case.message, 7.0, device="cuda")
    pack_heads([x.cuda() for x in case.tensors], message, case.slots)
    assert torch.equal(message.cpu(), case.message)
    targets = [torch.full_like(x, 5.0, device="cuda") for x in case.tensors]
    unpack_heads(message, targets, case.slots)
    check_unpacked(case, targets)


@interpreted
@settings(max_examples=25)
@given(case=cases())
def test_triton_interpreted(case: Packed) -> None:
    from ringattn.kernels.movement import heads_triton as pack_triton

    message = torch.full_like(case.message, 7.0)
    slots, heads = case.slots.tables(message.device)
    pack_triton.pack_heads(case.tensors, message, slots, case.slots.aligned)
    assert torch.equal(message, case.message)
    targets = [torch.full_like(x, 5.0) for x in case.tensors]
    pack_triton.unpack_heads(message, targets, slots, heads, case.slots.aligned)
    check_unpacked(case, targets)


@starts_the_interpreter
def test_in_the_interpreter() -> None:
    run_interpreted(__file__, 1)


@pytest.mark.gpu
def test_float64_is_added_in_float64_on_a_device() -> None:
    slots = Slots((Slot(0, 0, 0, 1), Slot(0, 0, 1, 1)))
    target = torch.zeros(1, 1, 1, dtype=torch.float64, device="cuda")
    unpack_heads(torch.tensor([1.0, 1e-12], dtype=torch.float64, device="cuda"), [target], slots)
    assert target.item() == 1.0 + 1e-12
