"""Other names for arguments: what a decorated function is and takes."""

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringattn import Mask, ParallelAttention, parallel_attention
from ringattn.names import ALIASES, accept_aliases, canonical
from tests.small_tensors import LAYOUT, tensors

NAMES = tuple(inspect.signature(parallel_attention).parameters)
PAIRS = [(name, alias) for name, aliases in ALIASES.items() for alias in aliases]


def test_canonical_names_are_arguments_of_the_public_function() -> None:
    assert {*ALIASES, "mask"} <= set(NAMES)
    assert not {alias for _, alias in PAIRS} & set(NAMES)


@accept_aliases
def attend(q: int, *, mask: Mask | None = None, softcap: float = 0.0) -> tuple[int, Mask | None, float]:
    """A function with some of the names."""
    return q, mask, softcap


def test_a_decorated_function_takes_both_and_shows_the_canonical_names() -> None:
    call: Any = attend
    assert call(1, logits_soft_cap=3.0, window_size=(4, 0)) == (1, Mask(window=(4, 0)), 3.0)
    assert call(q=1, softcap=3.0) == (1, None, 3.0)
    assert list(inspect.signature(attend).parameters) == ["q", "mask", "softcap"]
    with pytest.raises(TypeError, match="dropout"):  # an alias of an argument that this function has not
        call(1, dropout=0.5)


def test_names_are_only_translated_where_they_are_foreign() -> None:
    """A function that has an argument called `window` gets it as it is."""
    assert canonical({"window": 4, "logits_soft_cap": 2.0}, ("window", "softcap")) == {"window": 4, "softcap": 2.0}


def test_the_wrapper_can_be_traced_by_torch_compile() -> None:
    @accept_aliases
    def scaled(x: torch.Tensor, *, softmax_scale: float = 1.0) -> torch.Tensor:
        return x * softmax_scale

    compiled = torch.compile(scaled, backend="eager", fullgraph=True)
    assert compiled(torch.ones(2), softmax_scale=2.0).tolist() == [2.0, 2.0]


@given(tokens=st.integers(1, 9000))
def test_a_sliding_window_counts_the_query_itself(tokens: int) -> None:
    assert canonical({"sliding_window": tokens}, NAMES) == {"mask": Mask(window=(tokens - 1, 0))}
    assert canonical({"sliding_window": tokens, "mask": None}, NAMES) == {"mask": Mask(window=(tokens - 1, 0))}


def test_a_sliding_window_of_none_is_off() -> None:
    assert canonical({"sliding_window": None, "causal": False}, NAMES) == {"mask": Mask(causal=False)}


@pytest.mark.parametrize(("kwargs", "told"), [({"window": 4}, "window"), ({"sliding_window": 0}, "sliding_window")])
def test_a_bare_number_is_no_window(kwargs: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        canonical(kwargs, NAMES)


def test_three_tokens_are_the_query_and_two_before() -> None:
    mask = canonical({"sliding_window": 3}, NAMES)["mask"]
    rows = ["".join(".#"[int(seen)] for seen in row) for row in mask.dense(6).tolist()]
    assert rows == ["#.....", "##....", "###...", ".###..", "..###.", "...###"]


def test_a_bidirectional_sliding_window_is_ambiguous_and_refused() -> None:
    with pytest.raises(TypeError, match=r"'sliding_window'.*'causal'"):
        canonical({"sliding_window": 4, "causal": False}, NAMES)


bounds = st.integers(-1, 9000)


@given(pair=st.sampled_from(PAIRS), value=st.one_of(st.none(), st.floats()), other=st.booleans())
def test_every_alias_is_canonical(pair: tuple[str, str], value: float | None, other: bool) -> None:
    name, alias = pair
    rest = {"deterministic": other}
    assert canonical({alias: value} | rest, NAMES) == canonical({name: value} | rest, NAMES)
    assert canonical({name: value}, NAMES)[name] is value


@given(pair=st.sampled_from(PAIRS), values=st.tuples(st.floats(), st.floats()), swap=st.booleans())
def test_two_names_for_one_argument_raise(pair: tuple[str, str], values: tuple[float, float], swap: bool) -> None:
    both = dict(zip(pair[::-1] if swap else pair, values, strict=True))
    with pytest.raises(TypeError) as caught:
        canonical(both, NAMES)
    assert all(repr(name) in str(caught.value) for name in pair)


@given(left=bounds, right=bounds, causal=st.booleans(), name=st.sampled_from(["window", "window_size"]))
def test_windows_make_a_mask(left: int, right: int, causal: bool, name: str) -> None:
    for pair in ((left, right), [left, right]):
        assert canonical({name: pair, "causal": causal}, NAMES) == {"mask": Mask(causal, (left, right))}
    assert canonical({name: (left, right)}, NAMES) == {"mask": Mask(window=(left, right))}
    assert canonical({"causal": causal, "mask": None}, NAMES) == {"mask": Mask(causal)}


@pytest.mark.parametrize("name", ["causal", "window", "window_size", "sliding_window"])
def test_a_mask_and_a_part_of_it_raise(name: str) -> None:
    value: Any = {"causal": True, "sliding_window": 4}.get(name, (4, 0))
    with pytest.raises(TypeError, match=rf"'mask' and '{name}'"):
        canonical({"mask": Mask(), name: value}, NAMES)


def test_two_windows_raise() -> None:
    with pytest.raises(TypeError, match="'window_size' and 'sliding_window'"):
        canonical({"window_size": (3, 0), "sliding_window": 4}, NAMES)


def test_other_libraries_names_at_the_front_door() -> None:
    q, k, v = tensors()
    expected = parallel_attention(q, k, v, LAYOUT, mask=Mask(window=(4, 0)), softmax_scale=0.3)
    assert torch.equal(expected, parallel_attention(q, k, v, LAYOUT, sliding_window=5, scale=0.3))
    assert torch.equal(expected, parallel_attention(q, k, v, LAYOUT, window_size=(4, 0), scaling=0.3))
    with pytest.raises(TypeError, match="give one"):
        parallel_attention(q, k, v, LAYOUT, softmax_scale=0.3, scale=0.3)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("sofcap", "softcap"), ("slidingwindow", "sliding_window"), ("leanable_sink", "learnable_sink")],
)
def test_an_unknown_name_raises_with_the_closest(wrong: str, meant: str) -> None:
    with pytest.raises(TypeError, match=f"{wrong!r}; did you mean {meant!r}"):
        canonical({wrong: 1}, NAMES)


def test_a_name_like_no_other_raises_with_all() -> None:
    with pytest.raises(TypeError, match=r"known are .*softcap"):
        canonical({"zzz": 1}, NAMES)


def test_the_front_doors_refuse_a_misspelling() -> None:
    with pytest.raises(TypeError, match="'sofcap'; did you mean 'softcap'"):
        parallel_attention(*tensors(), LAYOUT, sofcap=1)
    with pytest.raises(TypeError, match="sceme"):
        ParallelAttention(None, sceme="ring")
