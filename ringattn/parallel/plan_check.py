"""A debugging aid: do all sequence ranks plan the same? Off unless RINGATTN_CHECK_PLANS says so."""

import hashlib
from typing import Any

import torch.distributed as dist

from ringattn.environment import CHECK_PLANS
from ringattn.parallel.layout import Layout
from ringattn.parallel.mesh import SequenceMesh
from ringattn.parallel.plan import AttentionPlan


def common_digest(plan: AttentionPlan, layout: Layout) -> str:
    """A hash of what must be the same on all ranks: the placement, and the shape of both passes."""
    parts: list[Any] = [layout.docs, layout.positions, layout.mesh.ring, layout.mesh.ulysses]
    for walked in (plan, plan.backward or plan):
        parts += [walked.schedule, len(walked.stages), walked.keep_keys, walked.wide_reduce]
    heads = None if plan.exchange is None else plan.exchange.heads
    return hashlib.sha256(repr([*parts, heads]).encode()).hexdigest()[:16]


def check_plan(plan: AttentionPlan, layout: Layout) -> None:
    """Compare a plan over the sequence group, the first time that it is used; collective.

    Raises RuntimeError on every rank if ranks differ, with the plan of each.
    """
    mesh = layout.mesh
    if CHECK_PLANS.read() != "on" or not isinstance(mesh, SequenceMesh) or mesh.sequence_size == 1:
        return
    key = ("checked", id(plan))
    if key in layout._plans:
        return
    mine = common_digest(plan, layout), f"{plan.schedule} of {len(plan.stages)} stages ({plan.reason})"
    found: list[Any] = [None] * mesh.sequence_size
    dist.all_gather_object(found, mine, group=mesh.sequence_group)
    if len({digest for digest, _ in found}) > 1:
        lines = [f"sequence rank {rank}: {digest} {text}" for rank, (digest, text) in enumerate(found)]
        raise RuntimeError("\n".join(["ranks planned differently:", *lines]))
    layout._plans[key] = plan
