"""In how many groups or chunks the heads of an attention go."""

from collections.abc import Sequence

from ringattn.kernels.spec import Call
from ringattn.parallel.plan.exchange import HeadShare
from ringattn.parallel.pricing.exchange_times import group_seconds
from ringattn.parallel.pricing.setting import PriceInputs

HEAD_GROUPS = (1, 2, 4)
GROUPS_GAIN = 0.01  # more groups are more launches, which the host may not have the time for


def choose_groups(setting: PriceInputs, calls: Sequence[Call], asked: int | None) -> tuple[int, str]:
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
        return groups, f"heads in {groups} groups" if groups > 1 else "heads in one group"
    priced = {
        groups: group_seconds(setting.machine, exchange, calls, setting.shape, groups, setting.wide_reduce)
        for groups in HEAD_GROUPS
        if fits(groups)
    }
    best = min(priced, key=lambda groups: (priced[groups], groups))
    if priced[best] > (1 - GROUPS_GAIN) * priced[1]:
        best = 1
    told = ", ".join(f"{groups}: {seconds * 1e3:.3f} ms" for groups, seconds in priced.items())
    return best, (f"heads in {best} groups" if best > 1 else "heads in one group") + f" of {told}" * (len(priced) > 1)


def chunk_counts(setting: PriceInputs, asked: int | None, memory_limit: int | None) -> list[int]:
    """In how many chunks of heads an attention may be computed, in ascending order.

    Gradients of copied key heads are summed over all heads of a rank, so there they stay together.

    Arguments:
        asked: take so many, or the next lower number into which key heads part on every rank.
    """
    exchange, shape = setting.exchange, setting.shape
    whole = HeadShare((0, shape.query_heads), tuple(range(shape.key_heads)))
    shares = (whole,) if exchange is None else exchange.heads
    whole_sums = exchange is not None and exchange.copied_keys and setting.wide_reduce
    most = 1 if whole_sums else min(len(share.keys) for share in shares)
    counts = [count for count in range(1, most + 1) if all(share.chunks_in(count) for share in shares)] or [1]
    if asked is not None:
        return [max(count for count in counts if count <= asked)]
    return counts[:1] if memory_limit is None else counts
