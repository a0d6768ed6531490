"""Rows that are dealt to replicas: each once, in the rounds that one process would take."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers")

from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, IterableDataset

from ringattn.hf.trainer.dealing import Place, ReplicaBatches, ReplicaRows


class Numbers(IterableDataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))


def places(replicas: int) -> list[Place]:
    meshes: list[Any] = [SimpleNamespace(data=replicas, data_rank=rank) for rank in range(replicas)]
    return [Place(mesh, 0, dealt=False) for mesh in meshes]


def in_batches(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def assert_dealt(found: list[list[list[int]]], count: int, size: int, drop_last: bool) -> None:
    """The batches of every replica are those of one process of as many rows a step, cut in turns."""
    replicas = len(found)
    whole = in_batches(list(range(count)), replicas * size)
    if drop_last:
        whole = [step for step in whole if len(step) == replicas * size]
    expected = [in_batches(step, size) for step in whole]
    assert found == [[step[rank] for step in expected if rank < len(step)] for rank in range(replicas)]


@settings(max_examples=40)
@given(count=st.integers(0, 30), size=st.integers(1, 4), replicas=st.integers(1, 5), drop_last=st.booleans())
def test_batches_of_indices_are_dealt_in_turns(count: int, size: int, replicas: int, drop_last: bool) -> None:
    dealt = [ReplicaBatches(BatchSampler(range(count), size, drop_last), place) for place in places(replicas)]
    found = [list(batches) for batches in dealt]
    assert_dealt(found, count, size, drop_last)
    assert {len(batches) for batches in dealt} == {len(found[0])}


@settings(max_examples=40)
@given(count=st.integers(0, 30), size=st.integers(1, 4), replicas=st.integers(1, 5), drop_last=st.booleans())
def test_rows_without_indices_are_dealt_in_turns(count: int, size: int, replicas: int, drop_last: bool) -> None:
    dealt = [ReplicaRows(Numbers(count), size, drop_last, place) for place in places(replicas)]
    found = [in_batches(list(rows), size) for rows in dealt]
    assert_dealt(found, count, size, drop_last)
    assert {len(rows) for rows in dealt} == {size * len(found[0])}
