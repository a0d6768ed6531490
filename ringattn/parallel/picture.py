"""A plan as a picture: which stage of which rank computes which pair of tokens. To look at, and to test small plans."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ringattn.kernels.backends.reference import allowed_pairs
from ringattn.kernels.spec import Range
from ringattn.parallel.plan.plan import AttentionPlan

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def stage_of_pairs(plan: AttentionPlan, total: int) -> Tensor:
    """(T, T) [query, key] in global indices: the stage in which a ring position computes a pair, or -1.

    Raises ValueError if the plan computes a pair more than once.
    """
    found = torch.full((total, total), -1, dtype=torch.int16)
    queries = _indices(plan.index)
    for number, stage in enumerate(plan.stages):
        keys = _indices(stage.index if number else plan.index)
        for call in stage.calls:
            for block in call.blocks:
                n = block.q[1] - block.q[0]
                rows, columns = queries[slice(*block.q)], keys[slice(*block.k)]
                seen = allowed_pairs(block, call.left, call.right, (0, n), found.device)
                part = found[rows[:, None], columns[None, :]]
                if (part[seen] >= 0).any():
                    raise ValueError(f"stage {number} of ring position {plan.ring_rank} computes a pair again: {block}")
                part[seen] = number
                found[rows[:, None], columns[None, :]] = part
    return found


def area(plan: AttentionPlan) -> int:
    """Number of pairs that a ring position computes: 2 (D + V) operations a head forward each, and backward 2.5 ×."""
    return sum(
        int(allowed_pairs(block, call.left, call.right, (0, block.q[1] - block.q[0]), torch.device("cpu")).sum())
        for stage in plan.stages
        for call in stage.calls
        for block in call.blocks
    )


def picture(plans: Sequence[AttentionPlan], total: int) -> str:
    """One line per query and one sign per key: the stage that computes the pair (0 to 9, a to z), or a dot."""
    found = torch.stack([stage_of_pairs(plan, total) for plan in plans])
    if ((found >= 0).sum(0) > 1).any():
        raise ValueError("two ring positions compute the same pair")
    return "\n".join("".join(_DIGITS[x % 36] if x >= 0 else "." for x in row) for row in found.amax(0).tolist())


def _indices(spans: Sequence[Range]) -> Tensor:
    return torch.cat([torch.arange(0), *(torch.arange(*span) for span in spans)])
