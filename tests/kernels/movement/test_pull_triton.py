"""Messages pulled out of the memory of peers: against slices, in Triton's interpreter and on a device."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.interpreter import interpreted, run_interpreted, starts_the_interpreter

UNITS = 16 // 2  # bfloat16 elements of a unit


@st.composite
def transfers(draw: st.DrawFn) -> tuple[int, int, list[tuple[int, int]]]:
    """Rank, start in the memory of peers, and of each peer where the message begins and its size; in units."""
    messages = draw(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 3000)), min_size=1, max_size=4))
    return draw(st.integers(0, len(messages) - 1)), draw(st.integers(0, 9)), messages


def check(case: tuple[int, int, list[tuple[int, int]]], device: str) -> None:
    from ringattn.kernels.movement.pull_triton import pull

    rank, start, messages = case
    memory = [torch.randn(4000 * UNITS, device=device).bfloat16() for _ in messages]
    addresses = torch.tensor([x.data_ptr() for x in memory], device=device)
    assert not any(x.data_ptr() % 16 for x in memory)
    sizes = [size for _, size in messages]
    begins = [sum(sizes[:peer]) for peer in range(len(sizes))]
    table = torch.tensor([[there, begin, size] for (there, size), begin in zip(messages, begins, strict=True)])
    target = torch.full((sum(sizes) * UNITS + 8,), 7.0, dtype=torch.bfloat16, device=device)
    pull(addresses, table.to(device), target, start, rank, max(sizes))
    parts = [x[(start + there) * UNITS :][: size * UNITS] for x, (there, size) in zip(memory, messages, strict=True)]
    assert torch.equal(target, torch.cat([*parts, target.new_full((8,), 7.0)]))


@pytest.mark.gpu
@given(case=transfers())
def test_messages_are_pulled_on_a_device(case: tuple[int, int, list[tuple[int, int]]]) -> None:
    check(case, "cuda")


@interpreted
@settings(max_examples=20, deadline=None)
@given(case=transfers())
def test_messages_are_pulled_interpreted(case: tuple[int, int, list[tuple[int, int]]]) -> None:
    check(case, "cpu")


@starts_the_interpreter
def test_in_the_interpreter() -> None:
    run_interpreted(__file__, 1)
