"""The loss is exact for any split, and a rank without targets gives zeros."""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

from ringattn.training.loss import backward_loss, share, token_loss_sum


def test_shares_of_any_split_average_to_the_gradient_of_the_mean():
    torch.manual_seed(0)
    logits = torch.randn(20, 7, dtype=torch.float64)
    targets = torch.randint(0, 7, (20,))
    targets[[2, 3, 19]] = -100
    whole = logits.clone().requires_grad_()
    torch.nn.functional.cross_entropy(whole, targets).backward()
    shared = logits.clone().requires_grad_()
    cuts = [0, 0, 3, 4, 20]  # an empty rank, one that is short, one whose only token has no target
    count = int((targets != -100).sum())
    sums = []
    for a, b in pairwise(cuts):
        sums.append(token_loss_sum(shared[a:b], targets[a:b]))
        (backward_loss(sums[-1], count, world_size=4) / 4).backward()  # what averaging over 4 ranks does
    torch.testing.assert_close(shared.grad, whole.grad, rtol=1e-13, atol=0)
    assert sum(s.item() for s in sums) / count == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, targets)), rel=1e-13
    )


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_target_is_zero_with_a_gradient(rows, dtype):
    logits = torch.randn(rows, 5, dtype=dtype, requires_grad=True)
    loss = backward_loss(token_loss_sum(logits, torch.full((rows,), -100)), 0, 8)
    assert loss.item() == 0
    loss.backward()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_the_softmax_is_computed_in_float32():
    logits = torch.randn(50, 1000).bfloat16()
    targets = torch.randint(0, 1000, (50,))
    loss = token_loss_sum(logits, targets)
    assert loss.dtype == torch.float32
    exact = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


def shared_by(rank_losses: list[float], stopping: int | None) -> list[tuple[float, float, bool]]:
    rank = dist.get_rank()
    loss = torch.tensor(rank_losses[rank], dtype=torch.float64)
    return [share(loss, norm, stopping == rank) for norm in (0.1, torch.tensor(0.1, dtype=torch.float64))]


def test_a_steps_results_come_together(pool):
    """Losses are added up, the norm is every rank's, and one rank that is asked to stop stops all."""
    for stopping in (None, 1):
        for found in pool(2).run(shared_by, [2.5, 1e-9], stopping):
            assert found == [(2.5 + 1e-9, 0.1, stopping is not None)] * 2
