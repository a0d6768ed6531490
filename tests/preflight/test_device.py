"""Tests of a device, on the CPU: a fault is seen, and a healthy one passes."""

import pytest
import torch

from ringattn.preflight import device
from ringattn.preflight.device import check_memory, check_product

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(device, "CPU_BYTES", 1 << 16)
    monkeypatch.setitem(device.SIDES, "cpu", 32)


def test_healthy_memory_has_no_wrong_words():
    assert check_memory(CPU) == {"bytes": 1 << 15, "wrong": 0}


@pytest.mark.parametrize(("where", "bit"), [(0, 0), (700, 62)])
def test_one_bit_that_does_not_hold_is_counted(monkeypatch, where, bit):
    """Stuck at 1 in the second chunk: of the patterns that want a 0 there each sees one wrong word."""
    written, patterns = device._addresses, []

    def stuck(chunk, number, pattern):
        written(chunk, number, pattern)
        if number == 1 and len(patterns) % 4 == 1:  # two chunks, then the two that are compared with
            patterns.append(not chunk[where] >> bit & 1)
            chunk[where] |= 1 << bit
        else:
            patterns.append(False)

    monkeypatch.setattr(device, "_addresses", stuck)
    assert check_memory(CPU)["wrong"] == sum(patterns) > 0


def test_two_addresses_of_one_cell_are_seen(monkeypatch):
    """Faults in address lines write twice to one place: every word has its own value."""
    written = device._addresses
    monkeypatch.setattr(device, "_addresses", lambda chunk, number, pattern: written(chunk, 0, pattern))
    fooled = check_memory(CPU)["wrong"]
    monkeypatch.setattr(device, "_addresses", written)
    chunks = []

    def aliased(chunk, number, pattern):
        written(chunk, number, pattern)
        chunks.append(chunk)
        if len(chunks) % 4 == 2:
            chunks[-2].copy_(chunk)

    monkeypatch.setattr(device, "_addresses", aliased)
    assert fooled == 0
    assert check_memory(CPU)["wrong"] > 0


def test_products_are_the_same_each_time_and_on_each_device():
    first, second = check_product(CPU), check_product(CPU)
    assert first["same"]
    assert first["digest"] == second["digest"]
    assert first["seconds"] > 0


def test_a_product_that_changes_is_seen(monkeypatch):
    equal = torch.equal
    answers = iter([True, True, False] + [True] * 20)
    monkeypatch.setattr(torch, "equal", lambda a, b: next(answers) and equal(a, b))
    assert not check_product(CPU)["same"]
