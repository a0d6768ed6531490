"""Every argument of the front door changes the result or is refused by name; none is dropped."""

import inspect
from typing import Any

import pytest
import torch

from ringattn import Mask, parallel_attention
from tests.small_tensors import LAYOUT, tensors

# Arguments of other libraries that none of ours stands for: masks and caches as tensors, biases of the scores, how a
# part of the kernel is rounded, and what a ring in a compiled loop is told.
UNKNOWN = (
    ("segment_ids", "attn_mask", "block_table", "seqused_k")
    + ("bias", "position_bias", "attn_bias", "alibi_slopes")
    + ("normalize_output", "logits_dtype", "precision", "softmax_dtype", "axis_name")
    + ("attention_sink_size", "causal_block_size", "prevent_cse", "policy")
)


@pytest.mark.parametrize("value", [None, 4, torch.zeros(4, 20, 20)], ids=["None", "4", "tensor"])
@pytest.mark.parametrize("name", UNKNOWN)
def test_what_no_argument_stands_for_is_refused(name: str, value: object) -> None:
    """Even where it asks for nothing: who passes it believes that it is read."""
    keywords: Any = {name: value}
    with pytest.raises(TypeError, match=f"unknown argument {name!r}"):
        parallel_attention(*tensors(), LAYOUT, **keywords)


@pytest.mark.parametrize(
    "options",
    [{"dropout_p": 0.1, "dropout_seed": 3, "backend": "cpu"}, {"softcap": 2.0, "backend": "cpu"}, {"backend": "fa4"}],
)
def test_features_that_the_named_backend_lacks_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match=r"dropout|softcap|cuda tensors only"):
        parallel_attention(*tensors(), LAYOUT, **options)


# What an argument is when it asks for something else, and what says only how to compute the same.
WHAT: dict[str, dict[str, Any]] = {
    "window": {"mask": Mask(window=(3, 0))},
    "bidirectional": {"mask": Mask(causal=False)},
    "chunk": {"mask": Mask(chunk=5)},
    "softmax_scale": {"softmax_scale": 0.1},
    "softcap": {"softcap": 0.5},
    "sinks": {"sinks": torch.ones(4)},
    "dropout": {"dropout_p": 0.5, "dropout_seed": 0},
}
HOW: dict[str, Any] = {
    "deterministic": True,
    "backend": "reference",
    "keep_keys": True,
    "wide_reduce": False,
    "memory_limit": 2**30,
    "head_groups": 1,
    "head_chunks": 2,
}


@pytest.mark.parametrize("changes", WHAT.values(), ids=WHAT)
def test_every_argument_changes_the_result(changes: dict[str, Any]) -> None:
    plain, changed = (parallel_attention(*tensors(), LAYOUT, **options) for options in ({}, changes))
    assert (plain - changed).norm() > 1e-2 * plain.norm()


@pytest.mark.parametrize("name", HOW)
def test_what_says_how_to_compute_changes_nothing(name: str) -> None:
    plain, same = (parallel_attention(*tensors(), LAYOUT, **options) for options in ({}, {name: HOW[name]}))
    torch.testing.assert_close(same, plain, rtol=1e-12, atol=1e-12)


def test_every_argument_is_tried() -> None:
    """One that is added belongs to one of the two lists."""
    tried = {name for changes in WHAT.values() for name in changes} | set(HOW)
    elsewhere = {"scheme", "stages"}  # of several ranks: tests/parallel/execution
    tensors_and_results = {"q", "k", "v", "layout", "return_lse"}
    assert set(inspect.signature(parallel_attention).parameters) == tried | elsewhere | tensors_and_results


@pytest.mark.parametrize(("name", "rows"), [("q", slice(19, 20)), ("k", slice(0, 7)), ("v", slice(0, 7))])
def test_queries_and_keys_of_different_lengths_are_refused(name: str, rows: slice) -> None:
    x = dict(zip("qkv", tensors(), strict=True))
    x[name] = x[name][rows]
    with pytest.raises(ValueError, match=f"{name} must hold the 20 tokens .* got {rows.stop - rows.start}"):
        parallel_attention(*x.values(), LAYOUT)


def test_an_unknown_name_is_told_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"backend must be auto or one of fa4, .*reference, got 'nope'"):
        parallel_attention(*tensors(), LAYOUT, backend="nope")


def test_without_autocast_nothing_is_cast_in_silence() -> None:
    q, k, v = tensors(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"share one floating dtype, got torch.float32, torch.bfloat16"):
        parallel_attention(q.float(), k, v, LAYOUT)


def test_dropout_without_a_seed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dropout_seed must be an integer >= 0 with dropout_p=0.5"):
        parallel_attention(*tensors(), LAYOUT, dropout_p=0.5)
