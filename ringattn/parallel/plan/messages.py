"""The messages of an exchange, in bytes: what prices and buffers are counted from. Pure."""

from ringattn.parallel.plan.exchange import Exchange
from ringattn.parallel.plan.shape import Shape

Widths = tuple[float, float]  # bytes of a query head and of a key head in a row of a message


def exchange_messages(
    exchange: Exchange, shape: Shape, backward: bool, wide_reduce: bool, groups: int = 1
) -> tuple[list[Widths], list[Widths]]:
    """The messages of a pass there and back: keys come with the first group of heads, and their gradients go with the
    last, or after it where gradients of a head's copies are added once they travelled."""
    query, value = shape.head_dim * shape.itemsize / groups, shape.value_dim * shape.itemsize / groups
    keys = (shape.head_dim + shape.value_dim) * shape.itemsize
    if not backward:
        return [(query, keys), *[(query, 0.0)] * (groups - 1)], [(value, 0.0)] * groups
    there: list[Widths] = [(value, 0.0)] * groups
    if exchange.copied_keys and wide_reduce:
        return there, [*[(query, 0.0)] * groups, (0.0, float((shape.head_dim + shape.value_dim) * shape.wide))]
    return there, [*[(query, 0.0)] * (groups - 1), (query, keys)]


def rank_widths(exchange: Exchange, widths: Widths) -> list[float]:
    """Bytes of a row of each rank's heads."""
    return [share.queries * widths[0] + len(share.keys) * widths[1] for share in exchange.heads]
