"""What `ringattn plan` says of one part of a layout, as plain values."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ringattn.commands import _workload
from ringattn.parallel.geometry.block_table import BlockTable
from ringattn.parallel.placement.placement import Placement
from ringattn.parallel.plan.plan import AttentionPlan
from ringattn.parallel.planning.planner import chosen
from ringattn.parallel.pricing.plan_cost import rank_cost
from ringattn.parallel.pricing.price import most_bytes
from ringattn.parallel.pricing.pricer import Pricer
from ringattn.parallel.pricing.setting import PriceInputs
from ringattn.parallel.schedules.candidates import candidates
from ringattn.parallel.simulation.simulate import simulate
from ringattn.parallel.simulation.spans import PASSES, Pass
from ringattn.parallel.simulation.traffic import Traffic
from ringattn.settings import AttentionOptions


@dataclass(frozen=True)
class PlannedPart:
    """A part of a layout with the plans of all its ranks, and what comes of them.

    Arguments:
        asked: what the whole attention was asked for; of its memory limit, what the parts before have left.
    """

    placement: Placement
    asked: AttentionOptions
    setting: PriceInputs
    plans: Sequence[AttentionPlan]

    @cached_property
    def passes(self) -> dict[str, Pass]:
        """Both passes of all ranks, played through."""
        machine, shape = self.setting.machine, self.setting.shape
        return {name: simulate(machine, self.plans, shape, backward) for name, backward in PASSES.items()}

    @cached_property
    def wire_bytes(self) -> tuple[list[float], list[float]]:
        """What each rank receives and sends in a forward pass: of all at once, as each message is of two of them."""
        traffic, ranks = Traffic(self.plans, self.setting.shape, backward=False), len(self.plans)
        received, sent = [0.0] * ranks, [0.0] * ranks
        for batch in (*traffic.batches("exchange"), *traffic.batches("cast")):
            for rank in range(ranks):
                for peer, size in traffic.sent(batch, rank):
                    sent[rank] += size
                    received[peer] += size
        return received, sent


def examine(part: PlannedPart, args: argparse.Namespace) -> dict[str, Any]:
    """Everything that the report says; times in seconds."""
    placement, setting, plans = part.placement, part.setting, part.plans
    mesh, shape, machine = placement.mesh, setting.shape, setting.machine
    ranks = [rank_report(part, rank) for rank in range(len(plans))]
    area = [rank["area"] for rank in ranks]
    gathered = sum(placement.position_sizes) * (mesh.ring - 1)
    received = sum(plan.received_rows for plan in plans[:: mesh.ulysses])
    return {
        "documents": {
            "count": len(placement.docs),
            "tokens": sum(placement.position_sizes),
            "longest": max(placement.docs.lengths, default=0),
        },
        "mesh": {"ring": mesh.ring, "ulysses": mesh.ulysses},
        "heads": [shape.query_heads, shape.key_heads],
        "head_dim": shape.head_dim,
        "machine": {"name": machine.name, **machine.provenance},
        "policy": placement.policy,
        "schedule": {name: plans[0].for_pass(backward).schedule_name for name, backward in PASSES.items()},
        "reason": plans[0].reason,
        "seconds": {name: one.seconds for name, one in part.passes.items()},
        "balance": max(area) * len(area) / sum(area) if sum(area) else 1.0,
        "received_share": received / gathered if gathered else 0.0,
        "alternatives": alternatives(part),
        "meshes": meshes(part, args),
        "ranks": ranks,
    }


def rank_report(part: PlannedPart, rank: int) -> dict[str, Any]:
    """One rank: what it holds, computes, sends and receives (forward), and its predicted seconds."""
    setting, plan = part.setting, part.plans[rank]
    received, sent = part.wire_bytes
    pairs = sum(int(BlockTable.of(stage.calls).areas.sum()) for stage in plan.stages)
    cost = rank_cost(setting.machine, plan, setting.shape)
    return {
        "rank": rank,
        "tokens": part.placement.tokens(rank),
        "area": pairs * setting.shape.share(plan.exchange).query_heads / setting.shape.query_heads,
        "received_bytes": received[rank],
        "sent_bytes": sent[rank],
        "stages": len(plan.stages),
        "head_chunks": plan.head_chunks,
        "buffer_bytes": int(cost.buffer_bytes),
        **{
            name: {
                "compute": one.compute,
                "wire": one.wire,
                "exposed": one.exposed,
                "simulated": part.passes[name].ends[rank],
            }
            for name, one in (("forward", cost.forward), ("backward", cost.backward))
        },
    }


def alternatives(part: PlannedPart) -> list[dict[str, Any]]:
    """Every schedule of this mesh with its predicted seconds and memory."""
    pricer = Pricer.of(part.placement, part.asked.mask, part.setting)
    out = []
    for schedule in candidates(part.placement.mesh.ring, "auto", None, part.placement.docs.segmented):
        forward, backward = pricer.price(schedule)
        out.append(
            {
                "schedule": schedule.name,
                "forward": forward.seconds,
                "backward": backward.seconds,
                "buffer_bytes": most_bytes((forward, backward)),
            }
        )
    return out


def meshes(part: PlannedPart, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The best schedules of every ring × ulysses with as many ranks, heads and memory permitting."""
    own, asked, setting = part.placement, part.asked, part.setting
    ranks, node = own.mesh.sequence_size, setting.machine.gpus_per_node
    out = []
    for ulysses in [size for size in range(1, ranks + 1) if ranks % size == 0]:
        if ulysses > setting.shape.query_heads or ulysses > node > 1:
            continue
        mesh = _workload.mesh(args, ranks // ulysses, ulysses)
        other = Placement(own.docs, mesh, args.policy, ((asked.mask, 1.0),), tokens=own.placed)
        try:
            _, choice = chosen(other, setting.shape, asked._replace(scheme="auto", stages=None))
        except ValueError:  # the memory limit
            continue
        seconds = {"forward": choice.cost.forward.seconds, "backward": choice.cost.backward.seconds}
        out.append({"ring": mesh.ring, "ulysses": ulysses, **seconds})
    return out
