"""Plans walked row by row: what every rank holds, which pairs it computes, whether both ends of a message agree."""

import torch

from ringattn import Documents, Layout, Mask, MeshShape
from ringattn.kernels.backends.reference import allowed_pairs
from ringattn.kernels.call import Call
from ringattn.parallel.plan.plan import AttentionPlan
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.planning.planner import plan_attention
from ringattn.settings import AttentionOptions
from tests.parallel.choice.test_schedule import with_links

SHAPE = Shape(4, 2, 128, 128)
SLOW = with_links(1e9)  # the choice depends on what must travel
Plans = list[tuple[Layout, AttentionPlan]]


def plans_of(
    docs: Documents, mask: Mask, ring: int, policy: str, scheme: str, stages: int | None, backward: bool = False
) -> Plans:
    """Of every rank, as the forward or as the backward pass walks it."""
    out = []
    for rank in range(ring):
        layout = Layout(docs, MeshShape(1, ring, 1, rank), policy, mask)
        options = AttentionOptions(mask, scheme=scheme, stages=stages)
        plan = plan_attention(layout, SHAPE, options, SLOW if scheme == "auto" else None)
        out.append((layout, plan.for_pass(backward)))
    return out


def buffers(plans: Plans, stage: int) -> list[torch.Tensor]:
    """The global index of every row of every rank's key buffer, filled by following copies and messages."""
    held = [layout.indices() for layout, _ in plans]
    if stage == 0:
        return held
    rows = []
    for rank, (_, plan) in enumerate(plans):
        step = plan.stages[stage]
        buffer = torch.full((step.rows,), -1)
        for source, target in step.copies:
            buffer[slice(*target)] = held[rank][slice(*source)]
        for peer in {message.peer for message in step.receives}:
            received = [message for message in step.receives if message.peer == peer]
            sent = [message for message in plans[peer][1].stages[stage].sends if message.peer == rank]
            assert [message.rows for message in received] == [message.rows for message in sent]
            for mine, theirs in zip(received, sent, strict=True):
                content = torch.cat([held[peer][slice(*span)] for span in theirs.ranges])
                for span in mine.ranges:
                    buffer[slice(*span)], content = content[: span[1] - span[0]], content[span[1] - span[0] :]
        for source, target in step.repeats:
            assert (buffer[slice(*source)] >= 0).all()
            assert (buffer[slice(*target)] == -1).all()
            buffer[slice(*target)] = buffer[slice(*source)]
        assert (buffer >= 0).all()
        assert buffer.tolist() == [token for start, stop in step.index for token in range(start, stop)]
        rows.append(buffer)
    return rows


def pairs_computed(plans: Plans, total: int) -> torch.Tensor:
    """How often each (query, key) of the stream is computed: (total, total). No row is received in vain."""
    count = torch.zeros(total, total, dtype=torch.int64)
    for stage in range(len(plans[0][1].stages)):
        keys = buffers(plans, stage)
        for rank, (layout, plan) in enumerate(plans):
            queries = layout.indices()
            seen_rows: set[int] = set()
            for call in plan.stages[stage].calls:
                check_order(call)
                for block in call.blocks:
                    rows = 0, block.q[1] - block.q[0]
                    pairs = allowed_pairs(block, call.left, call.right, rows, torch.device("cpu"))
                    for row, key in pairs.nonzero().tolist():
                        count[queries[block.q[0] + row], keys[rank][block.k[0] + key]] += 1
                    seen_rows |= set(range(*block.k)) if pairs.any() else set()
            if stage:
                assert seen_rows == set(range(plan.stages[stage].rows))
    return count


def check_order(call: Call) -> None:
    """Blocks of a call follow on each other: kernels take cumulative lengths."""
    assert all(a.q[1] == b.q[0] and a.k[1] <= b.k[0] for a, b in zip(call.blocks, call.blocks[1:], strict=False))


def check_routes(plans: Plans) -> None:
    """What a rank expects where in a peer's message buffer is what the peer sends there, and all know the largest."""
    for number in range(1, len(plans[0][1].stages)):
        stages = [plan.stages[number] for _, plan in plans]
        for routes in ([stage.cast for stage in stages], [stage.back for stage in stages]):
            assert {route.most for route in routes} == {max(route.sent for route in routes)}
            for rank, route in enumerate(routes):
                for peer, other in enumerate(routes):
                    assert route.receives[peer] == other.sends[rank]
                    assert route.there[peer] == sum(other.sends[:rank])
