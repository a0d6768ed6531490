"""A debugging aid: do all sequence ranks plan the same? Off unless RINGATTN_CHECK_PLANS says so."""

import hashlib
from typing import Any

import torch.distributed as dist

from ringattn.environment import CHECK_PLANS
from ringattn.kept import kept
from ringattn.parallel.layout import Layout
from ringattn.parallel.mesh.mesh import SequenceMesh
from ringattn.parallel.plan.plan import PartedPlan


def common_digest(plans: PartedPlan, layout: Layout) -> str:
    """A hash of what must be the same on all ranks: the placement, and the shape of both passes of every part."""
    common: list[Any] = []
    for part, (_, plan) in zip(layout.parts, plans.parts, strict=True):
        common += [part.docs, part.positions, part.mesh.ring, part.mesh.ulysses]
        for walked in plan.passes:
            common += [walked.schedule, walked.head_chunks, walked.keep_keys, walked.wide_reduce]
            common.append([(stage.cast.most, stage.back.most) for stage in walked.stages])
        common.append(None if plan.exchange is None else (plan.exchange.heads, plan.exchange.groups))
    return hashlib.sha256(repr(common).encode()).hexdigest()[:16]


def check_plan(plans: PartedPlan, layout: Layout) -> None:
    """Compare plans over the sequence group, the first time that they are used; collective.

    Raises RuntimeError on every rank if ranks differ, with the plan of each.
    """
    mesh = layout.mesh
    if CHECK_PLANS.read() != "on" or not isinstance(mesh, SequenceMesh) or mesh.sequence_size == 1:
        return
    kept(layout, ("checked", id(plans)), lambda: _compared(plans, layout, mesh))


def _compared(plans: PartedPlan, layout: Layout, mesh: SequenceMesh) -> PartedPlan:
    """The plans themselves, so that their id stays theirs."""
    texts = [f"{plan.schedule} of {len(plan.stages)} stages ({plan.reason})" for _, plan in plans.parts]
    mine = common_digest(plans, layout), " and ".join(texts)
    found: list[Any] = [None] * mesh.sequence_size
    dist.all_gather_object(found, mine, group=mesh.sequence_group)
    if len({digest for digest, _ in found}) > 1:
        lines = [f"sequence rank {rank}: {digest} {text}" for rank, (digest, text) in enumerate(found)]
        raise RuntimeError("\n".join(["ranks planned differently:", *lines]))
    return plans
