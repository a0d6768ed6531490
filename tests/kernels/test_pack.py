"""Packing heads for an exchange: plain copies and the Triton kernel against indexing."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn.kernels.pack import Slot, Slots, pack_heads

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, int, Slots, torch.Tensor]:
    """A tensor, the size of the buffer, slots that do not overlap, and the buffer that is right."""
    rows, heads = draw(st.integers(1, 70)), draw(st.integers(1, 3))
    dim = draw(st.sampled_from([1, 8, 12, 64, 128]))
    wide = torch.randn(rows, heads + 1, dim + 8, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
    x = wide[:, 1:, :dim]  # a view of a larger tensor
    order = draw(st.lists(st.integers(0, heads - 1), min_size=1, max_size=4))
    stride, gap = len(order) * dim + draw(st.sampled_from([0, 3, 8])), draw(st.sampled_from([0, 5, 16]))
    expected = torch.full((gap + rows * stride,), 7.0)
    for place, head in enumerate(order):
        expected[gap:].view(rows, stride)[:, place * dim : (place + 1) * dim] = x[:, head]
    return x, len(expected), Slots(tuple(Slot(head, gap + i * dim, stride) for i, head in enumerate(order))), expected


@given(case=cases())
def test_heads_are_where_the_slots_say(case: tuple[torch.Tensor, int, Slots, torch.Tensor]) -> None:
    x, size, slots, expected = case
    target = torch.full((size,), 7.0)
    pack_heads(x, target, slots)
    assert torch.equal(target, expected)


@pytest.mark.gpu
@given(case=cases())
def test_triton_on_a_device(case: tuple[torch.Tensor, int, Slots, torch.Tensor]) -> None:
    x, size, slots, expected = case
    target = torch.full((size,), 7.0, device="cuda")
    pack_heads(x.cuda(), target, slots)
    assert torch.equal(target.cpu(), expected)


@pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter")
@settings(max_examples=30)
@given(case=cases())
def test_triton_interpreted(case: tuple[torch.Tensor, int, Slots, torch.Tensor]) -> None:
    from ringattn.kernels import pack_triton

    x, size, slots, expected = case
    target = torch.full((size,), 7.0)
    pack_triton.pack_heads(x, target, slots.on(target.device), slots.aligned)
    assert torch.equal(target, expected)


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", __file__, "-k", "interpreted"]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "1 passed" in done.stdout
