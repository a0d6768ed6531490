"""`scheme="auto"`: the schedule with the least predicted time, for the forward and the backward pass apart.

Every rank prices all ring positions from the same integers, so that all come to the same choice without communication.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ringattn.parallel.pricing.price import Price, most_bytes
from ringattn.parallel.pricing.pricer import Pricer
from ringattn.parallel.pricing.timeline import PlanCost
from ringattn.parallel.schedules.schedule import Schedule

PAIR_SHARE = 9  # without a limit: key rows in two buffers at a time, as a multiple of a rank's own
# A ring rounds each query row several times, a gather once, and what a joint schedule waits for no kernel hides if the
# prediction was wrong: either must be faster by this much to be taken instead of a gather.
GAIN = 0.02


# Without a limit: what kept keys may take, as a share of the q, k, v and out that are kept anyway.
KEPT_SHARE = 0.5


@dataclass(frozen=True)
class Choice:
    """The schedules of both passes, what they cost, and why; with kept keys both are one."""

    forward: Schedule
    backward: Schedule
    cost: PlanCost
    reason: str
    keep_keys: bool = False


def choose(pricer: Pricer, options: Sequence[Schedule], memory_limit: int | None) -> Choice:
    """The best of `options` in each direction; one for both if the forward pass keeps its keys.

    Where the setting leaves that open, keys are kept if it is predicted to be faster and they fit: in the limit, or
    without one in `KEPT_SHARE`, but not beside chunks of heads, which are asked for to save memory.

    Arguments:
        memory_limit: bytes that a rank may have for buffers (`memory.buffer_bytes`); None: `PAIR_SHARE` decides.

    Raises ValueError if no option keeps the limit, with the least that is needed. Without a limit the option with the
    least memory is taken then.
    """
    setting = pricer.setting
    if len(options) > 1:
        options = [option for option in options if option.suits(pricer.demand.band)]
    if setting.keep_keys:
        found = _keeping(pricer, options, memory_limit)
    else:
        found = _casting(pricer, options, memory_limit)
        if setting.keep_keys is None and (setting.head_chunks == 1 or memory_limit is not None):
            found = _kept_if_better(pricer, found, memory_limit)
    return replace(found, reason=f"{found.reason}; predicted for {setting.machine}")


def _casting(pricer: Pricer, options: Sequence[Schedule], memory_limit: int | None) -> Choice:
    """Each pass by itself: keys are cast in both."""
    pairs: list[tuple[Price, ...]] = [pricer.price(option, False) for option in options]
    forward, backward = zip(*pairs, strict=True)
    (first,), why_first = _pick("forward", [(one,) for one in forward], memory_limit)
    (last,), why_last = _pick("backward", [(one,) for one in backward], memory_limit)
    choice = _choice(first, last, f"{why_first}; {why_last}", False)
    if memory_limit is not None and choice.cost.buffer_bytes > memory_limit:
        # Message buffers of the one pass are too large beside the buffers of the other.
        (first, last), reason = _pick("both passes", pairs, memory_limit)
        choice = _choice(first, last, reason, False)
    return choice


def _keeping(pricer: Pricer, options: Sequence[Schedule], memory_limit: int | None) -> Choice:
    (first, last), reason = _pick("both passes", [pricer.price(option, True) for option in options], memory_limit)
    return _choice(first, last, reason, True)


def _kept_if_better(pricer: Pricer, casting: Choice, memory_limit: int | None) -> Choice:
    """One of the schedules of `casting` for both passes with the keys kept, if it is faster and there is room."""
    options = list(dict.fromkeys((casting.forward, casting.backward)))
    if not any(price.kept for option in options for price in pricer.price(option, False)):
        return casting  # nothing is cast
    prices = {option: pricer.price(option, True) for option in options}
    best = min(options, key=lambda option: _seconds(prices[option]))
    first, last = prices[best]
    gain = 1 - _seconds(prices[best]) / casting.cost.total if casting.cost.total else 0.0
    room = first.kept_share <= KEPT_SHARE if memory_limit is None else most_bytes(prices[best]) <= memory_limit
    kept = f"{first.kept / 2**20:,.1f} MiB"
    if gain > 0 and room and _fits((first, last), memory_limit):
        reason = f"both passes {best.name} with {kept} of keys kept, {gain:.1%} faster than casting them again"
        return _choice(first, last, f"{reason} ({casting.reason})", True)
    why = f"they would take {kept}" if not room else "that would be no faster"
    return replace(casting, reason=f"{casting.reason}; keys are not kept, {why}")


def _choice(first: Price, last: Price, reason: str, keep_keys: bool) -> Choice:
    cost = PlanCost(first.slowest, last.slowest, most_bytes((first, last)))
    return Choice(first.schedule, last.schedule, cost, reason, keep_keys)


def _pick(what: str, options: list[tuple[Price, ...]], memory_limit: int | None) -> tuple[tuple[Price, ...], str]:
    """One of several options, each the prices of the passes that it stands for; and why."""
    fitting = [option for option in options if _fits(option, memory_limit)]
    if not fitting:
        least = min(options, key=most_bytes)
        if memory_limit is not None:
            raise ValueError(
                f"memory_limit must leave room for the buffers of a schedule, got {memory_limit} bytes; the least that "
                f"{what} needs is {most_bytes(least)} ({least[0].schedule.name})"
            )
        fitting = [least]
    best = min(fitting, key=_seconds)
    if _seconds(best) > (1 - GAIN) * _seconds(fitting[0]):
        best = fitting[0]
    waiting = sum(part.slowest.exposed for part in best)
    text = f"{what} {best[0].schedule.name} {_seconds(best) * 1e3:.3f} ms, {waiting * 1e3:.3f} of it waiting"
    others = []
    for option in options:
        if option is not best:
            more = f"{(_seconds(option) / _seconds(best) - 1) * 100:+.1f} %" if _seconds(best) else "no slower"
            room = "" if option in fitting else f", too large with {most_bytes(option) / 2**20:,.0f} MiB"
            others.append(f"{option[0].schedule.name} {more}{room}")
    return best, f"{text} ({', '.join(others)})" if others else text


def _seconds(option: tuple[Price, ...]) -> float:
    return sum(part.seconds for part in option)


def _fits(option: tuple[Price, ...], memory_limit: int | None) -> bool:
    if memory_limit is None:
        return all(price.pair_share <= PAIR_SHARE for price in option)
    return most_bytes(option) <= memory_limit
