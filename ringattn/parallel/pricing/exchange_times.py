"""How long an exchange of heads takes, as one or in groups beside the kernels. Pure."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from ringattn.kernels.spec import Call
from ringattn.parallel.geometry.block_table import BlockTable
from ringattn.parallel.machine.machine import (
    Machine,
    calls_seconds,
    copy_seconds,
    merge_seconds,
    transfer_seconds,
)
from ringattn.parallel.plan.exchange import Exchange
from ringattn.parallel.plan.messages import Widths, exchange_messages, rank_widths
from ringattn.parallel.plan.shape import Shape


class ExchangeTimes(NamedTuple):
    """Both ways of an exchange in one pass.

    Arguments:
        wire, copies: seconds on the wire, and of copies around it.
        lost: seconds that kernels lose if all of it travels beside them.
        messages: how many all-to-alls it is.
    """

    wire: float = 0.0
    copies: float = 0.0
    lost: float = 0.0
    messages: int = 0


def exchange_times(
    machine: Machine, exchange: Exchange | None, ring_rank: int, shape: Shape, backward: bool, wide_reduce: bool = True
) -> ExchangeTimes:
    """The exchange of heads in one pass; nothing without one.

    Queries, keys and values go there in one message and the output comes back; in the backward pass the output's
    gradient goes there and those of queries, keys and values come back. Tokens' rows are packed before they leave, and
    unpacked when they are back.
    """
    if exchange is None:
        return ExchangeTimes()
    there, back = exchange_messages(exchange, shape, backward, wide_reduce)
    messages = [*there, *back]
    wire = sum(_message_seconds(machine, exchange, ring_rank, widths) for widths in messages)
    copied = sum(exchange.own_rows * sum(rank_widths(exchange, widths)) for widths in messages)
    lost = _lost_seconds(machine, exchange, wire, len(messages))
    return ExchangeTimes(wire, copy_seconds(machine, copied, len(messages)), lost, len(messages))


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
        lost = _lost_seconds(machine, exchange, beside, counted)
        hidden = kernels * (groups - 1) / groups
        summed = 0.0
        if backward and groups > 1:  # the gradients of all keys are added up beside the message
            summed = merge_seconds(machine, groups * 3 * exchange.position_rows * own.wide_key_row_bytes, 3 * groups)
        total += kernels + lost + first + last + max(0.0, beside - hidden) + summed
    return total


def _lost_seconds(machine: Machine, exchange: Exchange, seconds: float, messages: int) -> float:
    """Seconds that kernels lose by so many messages of an exchange, of `seconds` together, beside them."""
    link = machine.links[machine.link_class(0, len(exchange.rows) - 1), "all_to_all"]
    return max(0.0, seconds - messages * link.latency) * link.bandwidth * link.disturbance


def _message_seconds(machine: Machine, exchange: Exchange, ring_rank: int, widths: Widths) -> float:
    """One message, which the ranks of a position send one another: of all its rows, or gradients of rows."""
    first = ring_rank * len(exchange.rows)
    by_rank = rank_widths(exchange, widths)
    mine = by_rank[exchange.rank]
    sent, received = exchange.own_rows * (sum(by_rank) - mine), (exchange.position_rows - exchange.own_rows) * mine
    link_class = machine.link_class(first, first + len(exchange.rows) - 1)
    return transfer_seconds(machine, max(sent, received), link_class, "all_to_all")
