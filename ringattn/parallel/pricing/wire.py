"""How long messages take on the links between ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ringattn.kernels.spec import Call
from ringattn.parallel.geometry.block_table import BlockTable
from ringattn.parallel.machine.machine import CLASSES, Machine, copy_seconds, merge_seconds, transfer_seconds
from ringattn.parallel.plan.exchange import Exchange
from ringattn.parallel.plan.messages import Widths, exchange_messages, rank_widths
from ringattn.parallel.plan.plan import AttentionPlan, Stage
from ringattn.parallel.plan.route import Message
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.pricing.kernel_times import calls_seconds
from ringattn.parallel.transport.buffers import PULLED


def _rows_by_class(machine: Machine, plan: AttentionPlan, stage: Stage) -> dict[str, int]:
    """Key rows that are sent or received, whichever is more, over each class of link."""
    return {
        link_class: max(
            sum(message.rows for message in messages if _class_of(machine, plan, message) == link_class)
            for messages in (stage.sends, stage.receives)
        )
        for link_class in CLASSES
    }


class _Wire(NamedTuple):
    """Seconds of a batch of messages beside kernels, those that kernels lose by it, and those of one that is pulled."""

    seconds: float = 0.0
    lost: float = 0.0
    pulled: float = 0.0


def _wire(machine: Machine, rows: Mapping[str, int], most: int, row_bytes: float) -> _Wire:
    """Both directions and both classes of link at the same time.

    Arguments:
        most: rows that any rank sends.
    """
    seconds = max(transfer_seconds(machine, rows[name] * row_bytes, name, "p2p") for name in CLASSES)
    if pulls(machine, most * row_bytes):
        return _Wire(pulled=seconds)
    lost = sum(rows[name] * row_bytes * machine.links[name, "p2p"].disturbance for name in CLASSES)
    return _Wire(seconds, lost)


def pulls(machine: Machine, most: Any) -> Any:
    """Whether messages on the ring axis are pulled, of which any rank sends so many bytes at most."""
    return ("ring" in machine.engines) & (most <= PULLED)


def _class_of(machine: Machine, plan: AttentionPlan, message: Message) -> str:
    ulysses, rank = (1, 0) if plan.exchange is None else (len(plan.exchange.rows), plan.exchange.rank)
    return machine.link_class(plan.ring_rank * ulysses + rank, message.peer * ulysses + rank)


def exchange_seconds(
    machine: Machine, exchange: Exchange | None, ring_rank: int, shape: Shape, backward: bool, wide_reduce: bool = True
) -> tuple[float, float]:
    """Wire and copies of the exchange of heads in one pass, seconds.

    Queries, keys and values go there in one message and the output comes back; in the backward pass the output's
    gradient goes there and those of queries, keys and values come back. Tokens' rows are packed before they leave, and
    unpacked when they are back.
    """
    if exchange is None:
        return 0.0, 0.0
    there, back = exchange_messages(exchange, shape, backward, wide_reduce)
    wire = sum(_message_seconds(machine, exchange, ring_rank, widths) for widths in (*there, *back))
    copied = sum(exchange.own_rows * sum(rank_widths(exchange, widths)) for widths in (*there, *back))
    return wire, copy_seconds(machine, copied, len(there) + len(back))


def group_seconds(
    machine: Machine, exchange: Exchange, calls: Sequence[Call], shape: Shape, groups: int, wide_reduce: bool = True
) -> float:
    """Both passes of a plan without casts whose heads travel in groups: the first group's way there and the last one's
    way back are waited for, the others' travel beside the kernels if those take long enough.

    Arguments:
        calls: of the whole pass.
    """
    own, total = shape.share(exchange), 0.0
    part = replace(own, query_heads=own.query_heads // groups, key_heads=max(1, own.key_heads // groups))
    table = BlockTable.of(calls)
    for backward in (False, True):
        kernels = groups * float(calls_seconds(machine, table, part, backward).sum())
        there, back = exchange_messages(exchange, shape, backward, wide_reduce, groups)
        seconds = [_message_seconds(machine, exchange, 0, widths) for widths in (*there, *back)]
        first, last = seconds[0], sum(seconds[len(there) + groups - 1 :])
        beside = sum(seconds) - first - last
        counted = len(seconds) - 1 - len(seconds[len(there) + groups - 1 :])
        lost = exchange_loss(machine, exchange, beside, counted)
        hidden = kernels * (groups - 1) / groups
        summed = 0.0
        if backward and groups > 1:  # the gradients of all keys are added up beside the message
            summed = merge_seconds(machine, groups * 3 * exchange.position_rows * own.wide_key_row_bytes, 3 * groups)
        total += kernels + lost + first + last + max(0.0, beside - hidden) + summed
    return total


def exchange_loss(machine: Machine, exchange: Exchange, seconds: float, messages: int) -> float:
    """Seconds that kernels lose by so many messages of an exchange, of `seconds` together, beside them."""
    link = machine.links[machine.link_class(0, len(exchange.rows) - 1), "all_to_all"]
    return max(0.0, seconds - messages * link.latency) * link.bandwidth * link.disturbance


def _message_seconds(machine: Machine, exchange: Exchange, ring_rank: int, widths: Widths) -> float:
    first = ring_rank * len(exchange.rows)
    by_rank = rank_widths(exchange, widths)
    mine = by_rank[exchange.rank]
    sent, received = exchange.own_rows * (sum(by_rank) - mine), (exchange.position_rows - exchange.own_rows) * mine
    link_class = machine.link_class(first, first + len(exchange.rows) - 1)
    return transfer_seconds(machine, max(sent, received), link_class, "all_to_all")
