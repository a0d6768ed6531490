"""Ranks that are slowed on purpose."""

import time

import pytest
import torch
import torch.distributed as dist

from ringattn.benchmarking.slow import Slow
from ringattn.benchmarking.timing import Timer
from tests.pool import Pools


def priced() -> list[float]:
    def waits_for_all() -> None:
        time.sleep(0.02)
        dist.barrier()

    def nothing_to_do_here() -> None:
        time.sleep(0.02 if dist.get_rank() == 0 else 0.005)

    timer = Timer(torch.device("cpu"), calls=2, repeats=3, warmups=1)
    return Slow(1.0, (1,)).costs([waits_for_all, nothing_to_do_here], [20.0, 5.0], lambda: None, timer)


def test_the_cost_is_what_all_ranks_wait(pool: Pools) -> None:
    for waiting, hidden in pool(2, "cpu").run(priced):
        assert 1.5 < waiting < 3.0  # 20 ms more on top of 20
        assert hidden < 1.4  # the slow rank has time to spare


@pytest.mark.parametrize(("share", "ranks", "why"), [(0.0, (0,), "slow must be > 0"), (0.1, (), "slow_ranks")])
def test_what_slows_nobody_is_refused(share: float, ranks: tuple[int, ...], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Slow(share, ranks)
