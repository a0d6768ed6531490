"""What a step brings to the host."""

import torch
import torch.distributed as dist

from ringattn.training.loss import brought, spoiling


def brought_by(stopping: int | None) -> list[tuple[float, float, bool, bool]]:
    loss = torch.tensor(2.5, dtype=torch.float64)
    return [brought(loss, norm, stopping == dist.get_rank()) for norm in (0.1, torch.tensor(0.1, dtype=torch.float64))]


def test_a_steps_results_come_together(pool):
    """Loss and norm are every rank's already, and one rank that is asked to stop stops all."""
    for stopping in (None, 1):
        for found in pool(2).run(brought_by, stopping):
            assert found == [(2.5, 0.1, stopping is not None, True)] * 2


def told_apart(digests: tuple[int, int]) -> bool:
    return brought(torch.tensor(1.0), 0.1, False, digests[dist.get_rank()]).alike


def test_ranks_that_do_not_the_same_step_are_told(pool):
    largest = 2**62 - 1
    assert pool(2).run(told_apart, (largest, largest)) == [True, True]
    assert pool(2).run(told_apart, (largest, largest - 1)) == [False, False]
    assert pool(2).run(told_apart, (0, 1)) == [False, False]


def test_the_gradients_of_a_loss_that_is_not_finite_are_not_either():
    for start, good in ((2.0, True), (float("inf"), False), (float("nan"), False)):
        weight = torch.tensor(3.0, requires_grad=True)
        loss = spoiling(weight + start)
        loss.backward()
        assert bool(torch.isfinite(weight.grad)) is good
        assert not good or (loss.item() == 5.0 and weight.grad.item() == 1.0)
