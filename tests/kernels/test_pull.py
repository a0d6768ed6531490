"""Messages pulled out of the memory of peers: against slices, in Triton's interpreter and on a device."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
UNITS = 16 // 2  # bfloat16 elements of a unit


@st.composite
def transfers(draw: st.DrawFn) -> tuple[int, int, list[tuple[int, int]]]:
    """Rank, start in the memory of peers, and of each peer where the message begins and its size; in units."""
    messages = draw(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 3000)), min_size=1, max_size=4))
    return draw(st.integers(0, len(messages) - 1)), draw(st.integers(0, 9)), messages


def check(case: tuple[int, int, list[tuple[int, int]]], device: str) -> None:
    from ringattn.kernels.pull_triton import pull

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


@pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter")
@settings(max_examples=20, deadline=None)
@given(case=transfers())
def test_messages_are_pulled_interpreted(case: tuple[int, int, list[tuple[int, int]]]) -> None:
    check(case, "cpu")


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", __file__, "-k", "interpreted"]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "1 passed" in done.stdout
