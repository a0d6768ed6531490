"""Numbers of host objects: how long they keep them, and what survives a copy."""

import copy
import pickle
import weakref
from typing import Any

import pytest
import torch

from ringattn import Documents, Layout, MeshShape
from ringattn.kept import kept
from ringattn.numbered import by_number, number_of


class Thing:
    """Something that can be referred to weakly."""


def test_memory_keeps_the_object_and_nothing_else_does() -> None:
    thing = Thing()
    seen, number = weakref.ref(thing), number_of(thing)
    del thing
    assert by_number(number) is seen()
    for other in (number.detach(), number.view(()), number[0], number.clone()):
        assert by_number(other) is seen()
    number = number.view(())  # the first tensor is gone, its memory is not
    assert by_number(number) is seen()
    copied = number.clone()
    del number, other
    assert seen() is None
    with pytest.raises(RuntimeError, match="its tensor was copied"):
        by_number(copied)


def test_numbers_are_made_anywhere() -> None:
    """On the host whatever the default device is, and fit to be saved for a backward pass."""
    with torch.device("meta"), torch.inference_mode():
        number = number_of("thing")
    assert (number.device.type, number.is_inference(), number.dtype) == ("cpu", False, torch.int64)
    assert by_number(number) == "thing"


def test_a_layout_goes_when_the_last_reference_goes() -> None:
    """By counting alone: its plans may hold memory of a device, which must not wait for the garbage collector."""
    layout = Layout(Documents([5, 3]), MeshShape(1, 2))
    plans = weakref.ref(by_number(layout._number))
    number, first = layout._number, layout.positions
    seen = weakref.ref(layout)
    del layout
    assert seen() is None
    assert by_number(number).positions is first
    assert by_number(number).tokens() == 4
    del number
    assert plans() is None


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_have_numbers_of_their_own(duplicate: Any) -> None:
    """Of a process that loads workers' batches, too: numbers of theirs are other layouts here."""
    layout = Layout(Documents([5, 3]), MeshShape(1, 2))
    kept(layout, "kept", object)
    other = duplicate(layout)
    assert int(other._number) != int(layout._number)
    assert by_number(other._number).__dict__ is other.__dict__
    assert (other.positions, other._kept) == (layout.positions, {})
    assert "kept" in layout._kept
