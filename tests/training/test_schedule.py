"""The learning rate: where it starts, peaks and ends."""

import pytest

from ringattn.training.schedule import Schedule


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
