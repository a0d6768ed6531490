"""Other names for arguments: what a decorated function is and takes (features/test_negotiation.py has the rest)."""

import inspect
from typing import Any

import pytest
import torch

from ringattn import Mask, parallel_attention
from ringattn.names import ALIASES, accept_aliases, canonical

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
