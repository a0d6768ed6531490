"""Rows taken apart and put together: what torch's own indexing gives, and its gradients, without its copies."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from ringattn.recurrent.piles import Rows, put_together, taken_apart


@st.composite
def dealt(draw: st.DrawFn) -> tuple[list[Rows], int]:
    """Piles, slices or numbers of rows, and how many rows there are; some may be in none."""
    count = draw(st.integers(1, 12))
    if draw(st.booleans()):
        marks = sorted(draw(st.lists(st.integers(0, count), max_size=5)))
        ends = [0, *marks, count] if draw(st.booleans()) else [*marks, count]
        piles: list[Rows] = [slice(a, b) for a, b in pairwise(ends)]
    else:
        piles = []
    if not piles:
        owner = [draw(st.integers(-1, 3)) for _ in range(count)]
        order = draw(st.permutations(range(count)))
        piles = [torch.tensor([row for row in order if owner[row] == pile], dtype=torch.int64) for pile in range(4)]
    return piles, count


@given(dealt())
def test_both_ways(given_piles: tuple[list[Rows], int]) -> None:
    piles, count = given_piles
    x = torch.randn(count, 3, dtype=torch.float64, requires_grad=True)
    parts = taken_apart(x, piles)
    expected = [x[rows] for rows in piles]
    for part, right in zip(parts, expected, strict=True):
        assert torch.equal(part, right)
    grads = [torch.randn_like(part) for part in parts]
    found = torch.autograd.grad(parts, x, grads)[0]
    assert torch.equal(found, torch.autograd.grad(expected, x, grads)[0])

    leaves = [part.detach().requires_grad_() for part in parts]
    whole = put_together(leaves, piles, count)
    right = torch.zeros(count, 3, dtype=torch.float64)
    for leaf, rows in zip(leaves, piles, strict=True):
        right[rows] = leaf.detach()
    assert torch.equal(whole, right)
    dout = torch.randn_like(right)
    for found, rows in zip(torch.autograd.grad(whole, leaves, dout), piles, strict=True):
        assert torch.equal(found, dout[rows])


def test_one_pile_of_all_rows_is_not_copied() -> None:
    x = torch.randn(5, 2, requires_grad=True)
    rows = slice(0, 5)
    (part,) = taken_apart(x, [rows])
    assert put_together([part], [rows], 5) is x
    part, none = taken_apart(x, [rows, slice(5, 5)])
    assert part.data_ptr() == x.data_ptr()
    out = put_together([none, part], [slice(5, 5), rows], 5)
    assert out.data_ptr() == x.data_ptr()
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.ones_like(x))


def test_a_pile_whose_gradient_nobody_asked_for() -> None:
    x = torch.randn(4, requires_grad=True)
    first, _ = taken_apart(x, [slice(0, 1), torch.tensor([3, 1])])
    assert torch.equal(torch.autograd.grad(first.sum(), x)[0], torch.tensor([1.0, 0, 0, 0]))
