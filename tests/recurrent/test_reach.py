"""Rows that an int32 cannot count, made few here: parts of heads and channels are the call itself."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringattn.recurrent.kernels import mamba, reach
from ringattn.recurrent.kernels.contract import Inputs
from ringattn.recurrent.kernels.mamba import Mamba
from ringattn.recurrent.kernels.reach import channels_of, near, parts_of
from ringattn.recurrent.kernels.taps import by_channels, torchs
from tests.recurrent.fake_packages import install
from tests.recurrent.problems import inputs


@given(
    st.integers(1, 40), st.sampled_from([(1, 1), (1, 6), (2, 4), (4, 4), (3, 12)]), st.integers(1, 9), st.integers(1, 9)
)
def test_parts_are_all_heads_once_and_within_reach(rows: int, heads: tuple[int, int], key: int, value: int) -> None:
    x = Inputs(
        torch.randn(rows, heads[0], key),
        torch.randn(rows, heads[0], key),
        torch.randn(rows, heads[1], value),
        torch.randn(rows, heads[1]),
        torch.randn(rows, heads[1]),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reach, "COUNTED", rows * max(key, value) * 2)
        parts = list(parts_of(x))
        assert [head for own, _ in parts for head in range(heads[1])[own]] == list(range(heads[1]))
        for own, part in parts:
            for one in part:
                assert (
                    one is None
                    or sum((n - 1) * s for n, s in zip(one.shape, one.stride(), strict=True)) < reach.COUNTED
                )
            assert torch.equal(part.v, x.v[:, own])
            group = heads[1] // heads[0]
            for at, head in enumerate(range(heads[1])[own]):
                inner = part.v.shape[1] // part.k.shape[1]
                assert torch.equal(part.k[:, at // inner], x.k[:, head // group])
        patch.setattr(reach, "COUNTED", rows * max(key, value) - 1)
        with pytest.raises(NotImplementedError, match="too many"):
            list(parts_of(x))


def test_what_is_within_reach_is_not_touched() -> None:
    x = inputs("steps", 20)
    ((own, part),) = parts_of(x)
    assert range(x.v.shape[1])[own] == range(x.v.shape[1])
    assert all(a is b for a, b in zip(part, x, strict=True))
    view = torch.empty(10, 100)[:, :10]
    assert near(view) is view


@pytest.mark.usefixtures("fresh_caches")
def test_mamba_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    lengths, x = (3, 70, 17), inputs("steps", 90)
    state = torch.randn(3, *x.state_shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for counted in (reach.COUNTED, 90 * x.v.shape[2] * 2):
        monkeypatch.setattr(reach, "COUNTED", counted)
        leaves, first = x.leaves(), state.clone().requires_grad_()
        out, last = Mamba().run(leaves, lengths, first)
        whole = Mamba().outputs(leaves, lengths)
        ((out * x.v).sum() + (last * state.flip(0)).sum() + (whole * x.v.flip(0)).sum()).backward()
        found.append([out, last, whole, first.grad, *(leaf.grad for leaf in leaves if leaf is not None)])
    assert len(list(parts_of(x))) > 1
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("fresh_caches")
@pytest.mark.parametrize("parted", [True, False])
def test_gradients_that_come_are_within_reach(monkeypatch: pytest.MonkeyPatch, parted: bool) -> None:
    """Those of parts put beside each other are views of the whole gradient, with its strides; so are those of an
    output that was a part of something larger."""
    install(monkeypatch)
    x = inputs("steps", 90)
    came: list[torch.Tensor] = []

    def watched(out: torch.Tensor) -> torch.Tensor:
        out.register_hook(came.append)
        return out

    def taps(*given: Any) -> torch.Tensor:
        return watched(torchs(*given))

    plain = mamba._function()

    def scan(**given: Any) -> Any:
        found = plain(**given)
        return (watched(found[0]), found[1]) if isinstance(found, tuple) else watched(found)

    monkeypatch.setattr(mamba, "_function", lambda: scan)
    limit = 90 * x.v.shape[2] * (2 if parted else x.v.shape[1])
    monkeypatch.setattr(reach, "COUNTED", limit)
    rows, weight = x.v.flatten(1).requires_grad_(), torch.randn(x.v[0].numel(), 3, dtype=x.v.dtype)
    for out in (
        Mamba().outputs(x.leaves(), (3, 70, 17)),
        Mamba().run(x.leaves(), (3, 70, 17), None)[0],
        by_channels(taps, rows, (3, 70, 17), weight, None, True),
    ):
        wide = torch.randn(*out.shape[:-1], 5 * out.shape[-1], dtype=out.dtype)
        out.backward(wide[..., : out.shape[-1]])
    assert len(came) >= (5 if parted else 3)
    for one in came:
        assert sum((size - 1) * stride for size, stride in zip(one.shape, one.stride(), strict=True)) < limit


@given(st.integers(1, 30), st.integers(1, 40), st.integers(1, 900))
def test_channels_are_all_once(rows: int, channels: int, counted: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reach, "COUNTED", counted)
        parts = [range(channels)[own] for own in channels_of(torch.empty(rows, channels))]
    assert [channel for part in parts for channel in part] == list(range(channels))
    assert all(rows * len(part) <= counted or len(part) == 1 for part in parts)
    if counted >= rows * 8 and channels % 8 == 0:
        assert all(len(part) % 8 == 0 for part in parts)


@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_in_parts(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of whole numbers, whose sums are exact in any order.
    x, weight, shift = (torch.randint(-9, 10, shape).double() for shape in ((9, 24), (24, 4), (24,)))
    given = x, (2, 7), weight, shift if bias else None, False
    monkeypatch.setattr(reach, "COUNTED", 9 * 10)
    assert len(list(channels_of(x))) == 3
    assert torch.equal(by_channels(torchs, *given), torchs(*given))
