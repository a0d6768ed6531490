"""The record of options: one list with keywords and operator, what it refuses, and copies of what holds it."""

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import ringattn.compiled  # noqa: F401  declares the operators
from ringattn import Documents, Layout, Mask, MeshShape, ParallelAttention, parallel_attention
from ringattn.parallel.planning.options import check_scheme
from ringattn.settings import AttentionOptions

# A value other than the default for every field: a new option must be added here.
OTHERS: dict[str, Any] = {
    "mask": Mask(False, (3, 4), 5),
    "softmax_scale": 0.5,
    "softcap": 30.0,
    "dropout_p": 0.1,
    "dropout_seed": 7,
    "deterministic": True,
    "backend": "reference",
    "scheme": "ring",
    "stages": 3,
    "keep_keys": True,
    "wide_reduce": False,
    "memory_limit": 2**30,
    "head_groups": 2,
    "head_chunks": 4,
    "return_lse": True,
}


def keywords(function: Any) -> dict[str, Any]:
    """Names and defaults of what a public function takes."""
    return {name: one.default for name, one in inspect.signature(function).parameters.items()}


def test_keywords_are_the_fields_with_the_same_defaults() -> None:
    defaults = AttentionOptions()._asdict() | {"mask": None}
    given = keywords(parallel_attention)
    assert {name: given[name] for name in defaults} == defaults
    assert given.keys() - defaults.keys() == {"q", "k", "v", "layout", "sinks"}
    of_module = keywords(ParallelAttention.__init__)
    of_calls = {"dropout_seed", "return_lse"}
    assert of_module.keys() - {"self", "mesh", "sinks"} == defaults.keys() - of_calls
    assert all(of_module[name] == defaults[name] for name in defaults.keys() - of_calls)


def test_constants_are_the_whole_record() -> None:
    assert OTHERS.keys() == AttentionOptions()._asdict().keys()
    for options in (AttentionOptions(), AttentionOptions(**OTHERS)):
        constants = options.to_constants()
        assert len(constants) == len(AttentionOptions.constant_types())
        assert AttentionOptions.from_constants(constants) == options
        as_lists = [list(value) if isinstance(value, tuple) else value for value in constants]
        assert AttentionOptions.from_constants(as_lists) == options


def test_the_operator_takes_the_constants_by_name() -> None:
    arguments = [one.name for one in torch.ops.ringattn.attend.default._schema.arguments]
    assert arguments[5:-1] == list(AttentionOptions.constant_types())


def test_plans_are_shared_by_what_they_do_not_depend_on() -> None:
    plain = AttentionOptions().for_planning()
    different = {name for name, value in OTHERS.items() if AttentionOptions(**{name: value}).for_planning() != plain}
    free = {"softmax_scale", "softcap", "dropout_p", "dropout_seed", "deterministic", "backend", "return_lse"}
    assert different == OTHERS.keys() - free


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"mask": "causal"}, "mask must be a Mask, got str"),
    ({"softmax_scale": "1"}, "softmax_scale must be a number, which has no gradient, got str"),
    ({"softmax_scale": float("nan")}, "softmax_scale must be a number, got nan"),
    ({"softcap": -1.0}, r"softcap must be >= 0 \(0 or None is off\), got -1.0"),
    ({"softcap": float("nan")}, "softcap must be >= 0"),
    ({"dropout_p": None}, "dropout_p must be a number, which has no gradient, got NoneType"),
    ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
    ({"scheme": "rings"}, "scheme must be one of auto, ring, .* got 'rings'"),
    ({"scheme": "ring", "stages": 1}, "stages must be an integer >= 2 .* got 1"),
    ({"scheme": "gather", "stages": 2}, 'stages belongs to scheme="ring", got stages=2 with scheme="gather"'),
    ({"memory_limit": -1}, "memory_limit must be None or a number of bytes >= 0, got -1"),
    ({"memory_limit": 1.5}, "memory_limit must be None or a number of bytes >= 0, got 1.5"),
    ({"head_groups": 0}, "head_groups must be None or an integer >= 1, got 0"),
    ({"head_chunks": "2"}, "head_chunks must be None or an integer >= 1, got '2'"),
    ({"head_groups": 2, "head_chunks": 2}, "head_groups and head_chunks must not both be above 1, got 2 and 2"),
]


@pytest.mark.parametrize(("options", "words"), WRONG)
def test_wrong_options_are_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_scheme(AttentionOptions(**options), MeshShape())
    layout = Layout(Documents([8]), MeshShape())
    q, k, v = (torch.randn(8, heads, 8) for heads in (4, 4, 4))
    with pytest.raises(ValueError, match=words):
        parallel_attention(q, k, v, layout, **options)


def test_a_compiled_call_refuses_wrong_options_as_well() -> None:
    layout = Layout(Documents([8]), MeshShape())
    q, k, v = (torch.randn(8, heads, 8) for heads in (4, 4, 4))

    @torch.compile(fullgraph=True, backend="eager")
    def attend(memory_limit: int, softmax_scale: float) -> torch.Tensor:
        return parallel_attention(q, k, v, layout, memory_limit=memory_limit, softmax_scale=softmax_scale)

    with pytest.raises(ValueError, match="memory_limit must be None or a number of bytes >= 0, got -1"):
        attend(-1, 1.0)
    with pytest.raises(ValueError, match="softmax_scale must be a number, got nan"):
        attend(2**30, float("nan"))


@pytest.mark.parametrize("seed", [None, -1, 1.5])
def test_a_wrong_seed_is_refused_where_something_is_dropped(seed: Any) -> None:
    assert AttentionOptions(dropout_seed=seed).dropout() is None
    with pytest.raises(ValueError, match=f"dropout_seed must be an integer >= 0 with dropout_p=0.5, .* got {seed}"):
        AttentionOptions(dropout_p=0.5, dropout_seed=seed).dropout()
    assert AttentionOptions(dropout_p=0.5, dropout_seed=3).dropout() == (0.5, 3)


def test_a_module_shows_its_mask_and_what_is_not_the_default() -> None:
    assert repr(ParallelAttention(MeshShape())) == "ParallelAttention(mask=causal)"
    attn = ParallelAttention(MeshShape(), Mask(window=(7, 0)), softcap=30.0, dropout_p=0.1, scheme="ring", stages=2)
    shown = "mask=causal window 7,0, softcap=30.0, dropout_p=0.1, scheme=ring, stages=2"
    assert repr(attn) == f"ParallelAttention({shown})"
    assert attn.dropout_p == 0.1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_a_module_attend_as_it_does(copied: Any) -> None:
    sinks = nn.Parameter(torch.randn(4))
    attn = ParallelAttention(MeshShape(), Mask(window=(3, 0)), softcap=0.5, sinks=sinks, head_chunks=2)
    again = copied(attn)
    assert again.options == attn.options
    assert repr(again) == repr(attn)
    layout = Layout(Documents([9, 3]), MeshShape())
    q, k, v = (torch.randn(12, 4, 8) for _ in range(3))
    assert torch.equal(attn(q, k, v, layout), again(q, k, v, layout))


def test_nothing_is_dropped_in_evaluation() -> None:
    layout = Layout(Documents([9, 3]), MeshShape())
    q, k, v = (torch.randn(12, 4, 8) for _ in range(3))
    attn = ParallelAttention(MeshShape(), dropout_p=0.5)
    dropped = attn(q, k, v, layout, dropout_seed=1)
    assert torch.equal(dropped, parallel_attention(q, k, v, layout, dropout_p=0.5, dropout_seed=1))
    whole = attn.eval()(q, k, v, layout)
    assert torch.equal(whole, parallel_attention(q, k, v, layout))
    assert not torch.equal(whole, dropped)
