"""`scheme="auto"`: the schedule with the least predicted time, for the forward and the backward pass apart.

Every rank prices all ring positions from the same integers, so that all come to the same choice without communication.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ringattn.kernels.spec import Call
from ringattn.parallel.cost import PlanCost, group_seconds
from ringattn.parallel.demand import Demand
from ringattn.parallel.pricing import Candidate, Price, Pricer, Setting

RING_STAGES = 4  # of a ring that was asked for without a number
PAIR_SHARE = 8  # without a limit: key rows in two buffers at a time, as a multiple of a rank's own
HEAD_GROUPS = (1, 2, 4)
GROUPS_GAIN = 0.01  # more groups are more launches, which the host may not have the time for
# A ring rounds each query row several times, a gather once: it must be faster by this much to be taken instead.
RING_GAIN = 0.02


def candidates(ring: int, scheme: str, stages: int | None) -> list[Candidate]:
    """What `scheme` leaves to choose from, the most accurate first."""
    if ring == 1:
        return [Candidate("local", 1)]
    if scheme == "gather":
        return [Candidate("gather", 2)]
    if scheme == "ring":
        return [Candidate("ring", stages or RING_STAGES)]
    counts = {2, 3, *(1 << power for power in range(2, ring.bit_length())), ring}
    return [Candidate("gather", 2), *(Candidate("ring", count) for count in sorted(counts) if count <= ring)]


@dataclass(frozen=True)
class Choice:
    """The schedules of both passes, what they cost, and why."""

    forward: Candidate
    backward: Candidate
    cost: PlanCost
    reason: str


def choose(demand: Demand, setting: Setting, options: Sequence[Candidate], memory_limit: int | None) -> Choice:
    """The best of `options` in each direction; one for both if the forward pass keeps its keys.

    Arguments:
        memory_limit: bytes that a rank may have for buffers (`AttentionPlan.buffer_bytes`); None: `PAIR_SHARE` decides.

    Raises ValueError if no option keeps the limit, with the least that is needed. Without a limit the option with the
    least memory is taken then.
    """
    pricer = Pricer(demand, setting)
    forward, backward = zip(*(pricer.price(option) for option in options), strict=True)
    if setting.keep_keys:
        picked, reason = _pick("both passes", list(zip(forward, backward, strict=True)), memory_limit)
        first, last = picked
    else:
        (first,), why_first = _pick("forward", [(one,) for one in forward], memory_limit)
        (last,), why_last = _pick("backward", [(one,) for one in backward], memory_limit)
        reason = f"{why_first}; {why_last}"
    cost = PlanCost(first.slowest, last.slowest, max(first.most_bytes, last.most_bytes))
    return Choice(first.candidate, last.candidate, cost, f"{reason}; predicted for {setting.machine}")


def choose_groups(setting: Setting, calls: Sequence[Call], asked: int | None) -> tuple[int, str]:
    """In how many groups the heads of an exchange travel, and why; the same on all ranks of a position.

    Arguments:
        calls: of the position, all local.
        asked: take so many instead of the fastest, or the next lower number into which heads part on every rank.
    """
    exchange = setting.exchange
    assert exchange is not None

    def fits(groups: int) -> bool:
        return groups == 1 or all(share.parts_in(groups) for share in exchange.heads)

    if asked is not None:
        groups = next(count for count in range(asked, 0, -1) if fits(count))
        return groups, f"heads in {groups} groups, as asked for"
    priced = {
        groups: group_seconds(setting.machine, exchange, calls, setting.shape, groups, setting.wide_reduce)
        for groups in HEAD_GROUPS
        if fits(groups)
    }
    best = min(priced, key=lambda groups: (priced[groups], groups))
    if priced[best] > (1 - GROUPS_GAIN) * priced[1]:
        best = 1
    told = ", ".join(f"{groups}: {seconds * 1e3:.3f} ms" for groups, seconds in priced.items())
    return best, f"heads in {best} groups ({told})" if len(priced) > 1 else f"heads in {best} group"


def _pick(what: str, options: list[tuple[Price, ...]], memory_limit: int | None) -> tuple[tuple[Price, ...], str]:
    """One of several options, each the prices of the passes that it stands for; and why."""
    fitting = [option for option in options if all(_fits(part, memory_limit) for part in option)]
    if not fitting:
        least = min(options, key=_bytes)
        if memory_limit is not None:
            raise ValueError(
                f"memory_limit must leave room for the buffers of a schedule, got {memory_limit} bytes; the least that "
                f"{what} needs is {_bytes(least)} ({least[0].candidate.name})"
            )
        fitting = [least]
    best = min(fitting, key=_seconds)
    accurate = fitting[0]
    if best[0].candidate.schedule == "ring" and _seconds(best) > (1 - RING_GAIN) * _seconds(accurate):
        best = accurate
    waiting = sum(part.slowest.exposed for part in best)
    text = f"{what} {best[0].candidate.name} {_seconds(best) * 1e3:.3f} ms, {waiting * 1e3:.3f} of it waiting"
    others = []
    for option in options:
        if option is not best:
            more = f"{(_seconds(option) / _seconds(best) - 1) * 100:+.1f} %" if _seconds(best) else "no slower"
            room = "" if option in fitting else f", too large with {_bytes(option) / 2**20:,.0f} MiB"
            others.append(f"{option[0].candidate.name} {more}{room}")
    return best, f"{text} ({', '.join(others)})" if others else text


def _seconds(option: tuple[Price, ...]) -> float:
    return sum(part.seconds for part in option)


def _bytes(option: tuple[Price, ...]) -> int:
    return max(part.most_bytes for part in option)


def _fits(price: Price, memory_limit: int | None) -> bool:
    if memory_limit is None:
        return price.pair_share <= PAIR_SHARE
    return price.most_bytes <= memory_limit
