"""The learning rate: where it starts, peaks and ends."""

import pytest

from ringattn.training.schedule import SHAPES, Schedule


def test_warmup_peak_and_end():
    rate = Schedule(peak=2.0, warmup_steps=4, total_steps=20, min_ratio=0.1)
    assert [rate(step) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rate(12) == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert rate(20) == rate(1000) == pytest.approx(0.2)
    rates = [rate(step) for step in range(4, 21)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_any_warmup_gives_positive_rates(warmup):
    rate = Schedule(1.0, warmup, 10, 0.0)
    assert all(0 < rate(step) <= 1 for step in range(10))


def test_constant_stays_at_the_peak():
    rate = Schedule(2.0, 4, 20, 0.1, "constant")
    assert [rate(step) for step in (0, 3, 4, 12, 19, 100)] == [0.5, 2.0, 2.0, 2.0, 2.0, 2.0]


def test_wsd_is_stable_and_then_falls_in_its_last_steps():
    rate = Schedule(2.0, 4, 20, 0.1, "wsd", decay_steps=5)
    assert [rate(step) for step in (3, 4, 10, 15)] == [2.0] * 4
    assert rate(16) == pytest.approx(2.0 * (0.1 + 0.9 * 4 / 5))
    assert rate(20) == rate(1000) == pytest.approx(0.2)


def test_a_longer_wsd_has_the_same_rates_in_its_stable_part():
    short, long = (Schedule(1.0, 2, total, 0.0, "wsd", decay_steps=4) for total in (20, 50))
    assert [short(step) for step in range(16)] == [long(step) for step in range(16)]
    cosines = [Schedule(1.0, 2, total, 0.0) for total in (20, 50)]
    assert cosines[0](10) != cosines[1](10)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_moves_in_every_step(shape):
    rate = Schedule(1.0, 3, 12, 0.0, shape, decay_steps=12)
    assert all(0 < rate(step) <= 1 for step in range(12))
