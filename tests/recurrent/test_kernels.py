"""The chunked kernel against the one that goes token by token, with the affine map of a piece."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn.recurrent.kernels.chunked import CHUNK, Chunked
from ringattn.recurrent.kernels.contract import Inputs, apply_map, compose, maps, transposed
from ringattn.recurrent.kernels.loading import LAYOUTS, cumulative, numbers
from ringattn.recurrent.kernels.tokens import Tokens
from tests.recurrent.problems import RULES, inputs


def leaves_of(x: Inputs) -> Inputs:
    return Inputs(*(None if one is None else one.clone().requires_grad_() for one in x))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("lengths", [(1,), (CHUNK,), (3, 2 * CHUNK + 5, 1, CHUNK - 1, 17)])
def test_chunks_are_the_recurrence(rule: str, lengths: tuple[int, ...]) -> None:
    x = inputs(rule, sum(lengths))
    generator = torch.Generator().manual_seed(1)
    state = torch.randn(len(lengths), *x.state_shape, generator=generator, dtype=torch.float64)
    weights = torch.randn(sum(lengths), *x.v.shape[1:], generator=generator, dtype=torch.float64)
    found = []
    for kernel in (Tokens(), Chunked()):
        leaves, first = leaves_of(x), state.clone().requires_grad_()
        out, last = kernel.run(leaves, lengths, first)
        ((out * weights).sum() + (last * state.flip(0)).sum()).backward()
        found.append([out, last, first.grad, *(one.grad for one in leaves if one is not None)])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", [Tokens(), Chunked()], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=5)
@given(lengths=st.lists(st.integers(1, 40), max_size=4).map(tuple), seed=st.integers(0, 99))
def test_a_piece_is_an_affine_map(kernel, rule: str, lengths: tuple[int, ...], seed: int) -> None:
    x = inputs(rule, sum(lengths), seed=seed)
    M, U = maps(kernel, x, lengths)
    S, dS = torch.randn(
        2, len(lengths), *x.state_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    _, last = Tokens().run(x, lengths, S)
    torch.testing.assert_close(apply_map(M, S) + U, last, rtol=1e-12, atol=1e-12)
    product = (apply_map(transposed(M), dS) * S).sum()
    torch.testing.assert_close(product, (dS * apply_map(M, S)).sum(), rtol=1e-11, atol=1e-11)
    twice = apply_map(compose(M, M.flip(0)), S)
    torch.testing.assert_close(twice, apply_map(M, apply_map(M.flip(0), S)), rtol=1e-11, atol=1e-11)


def test_strong_decays_stay_finite() -> None:
    """Sums of logarithms of hundreds within a chunk, in both directions of the exponent."""
    for rule in RULES:
        x = inputs(rule, 130)
        x = leaves_of(x._replace(decay=x.decay * 400))
        out, last = Chunked().run(x, (130,), None)
        expected, _ = Tokens().run(x, (130,), None)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        (out.sum() + last.sum()).backward()
        assert all(bool(one.grad.isfinite().all()) for one in x if one is not None)


def test_states_are_wide() -> None:
    x = Inputs(*(None if one is None else one.bfloat16() for one in inputs("delta", 9)))
    out, last = Chunked().run(x, (9,), None)
    assert (out.dtype, last.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.usefixtures("fresh_caches")
def test_what_kernels_are_told_of_a_layout_is_not_kept_for_ever() -> None:
    """A run has as many layouts as steps."""
    for made in (cumulative, numbers):
        first = weakref.ref(made((1, 2), torch.device("cpu")))
        assert made((1, 2), torch.device("cpu")) is first(), "packages keep what they compute of it by identity"
        for length in range(2 * LAYOUTS):
            made((length + 1, 7), torch.device("cpu"))
        gc.collect()
        assert first() is None
