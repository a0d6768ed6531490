"""What a step brings to the host."""

import torch
import torch.distributed as dist

from ringattn.training.loss import brought


def brought_by(stopping: int | None) -> list[tuple[float, float, bool]]:
    loss = torch.tensor(2.5, dtype=torch.float64)
    return [brought(loss, norm, stopping == dist.get_rank()) for norm in (0.1, torch.tensor(0.1, dtype=torch.float64))]


def test_a_steps_results_come_together(pool):
    """Loss and norm are every rank's already, and one rank that is asked to stop stops all."""
    for stopping in (None, 1):
        for found in pool(2).run(brought_by, stopping):
            assert found == [(2.5, 0.1, stopping is not None)] * 2
