"""What the two routes of a recurrence take, and which is cheaper. Pure numbers, the same on every rank.

The scan moves (M, U) of the pieces of cut documents, whose size does not depend on their length, and computes the cut
pieces' states twice more. The exchange moves every token's rows and computes nothing twice.
"""

from dataclasses import dataclass

from ringattn.parallel.layout import Layout
from ringattn.parallel.machine.machine import Machine, transfer_seconds
from ringattn.recurrent.plan import by_document, pieces_of

ROUTES = ("scan", "exchange")
# Tokens of a chunk, and what part of an attention kernel's rate the products of a recurrence reach: its matrices are
# smaller. Not calibrated.
CHUNK, RATE = 64, 0.3


@dataclass(frozen=True)
class RecurrenceShape:
    """Heads and dims of a recurrence; `itemsize` is bytes per element of q, k and v.

    Arguments:
        delta: the delta rule, whose map is a matrix a head.
        diagonal: decays by key dim.
    """

    key_heads: int
    heads: int
    key_dim: int
    value_dim: int
    delta: bool
    diagonal: bool
    itemsize: int = 2

    @property
    def map_numbers(self) -> int:
        """Numbers of a piece's M."""
        size = self.key_dim * self.key_dim if self.delta else self.key_dim if self.diagonal else 1
        return self.heads * size

    @property
    def state_numbers(self) -> int:
        """Numbers of a state, and so of U and R."""
        return self.heads * self.key_dim * self.value_dim

    @property
    def flops(self) -> float:
        """Of a token, forward, in chunks."""
        within = CHUNK * (2 * self.key_dim + (2 if self.delta else 1) * self.value_dim)
        return 2.0 * self.heads * (within + (3 if self.delta else 2) * self.key_dim * self.value_dim)

    def row_numbers(self, ranks: int) -> int:
        """Numbers of a token that the exchange moves: key heads that several ranks need are sent to each."""
        decays = self.heads * (self.key_dim if self.diagonal else 1)
        keys = max(self.key_heads, ranks) if self.heads >= ranks else self.key_heads
        return 2 * keys * self.key_dim + 2 * self.heads * self.value_dim + decays + self.heads * self.delta


@dataclass(frozen=True)
class RoutePrice:
    """Seconds of a layer's forward and backward pass beside the kernel on an even share, and bytes sent by a rank."""

    route: str
    seconds: float
    sent: float


def kernel_seconds(shape: RecurrenceShape, rows: float, machine: Machine) -> float:
    """Of a layer's kernel on so many rows, forward."""
    return rows * shape.flops / (machine.rate(shape.key_dim, False).flops * RATE)


def map_share(shape: RecurrenceShape) -> float:
    """What the map of a piece takes beside its last state, by what that takes: columns of keys beside values."""
    return shape.key_dim / shape.value_dim if shape.delta else 0.0


def gathered_bytes(layout: Layout, shape: RecurrenceShape) -> tuple[float, float]:
    """Bytes that a rank sends by the scan: (M, U) of as many pieces as any rank has cut, and backward R."""
    held = [len(rows) for rows in _cut_rows(layout)]
    sent = float(max(4, shape.itemsize) * max(held) * (len(held) - 1))
    return sent * (shape.map_numbers + shape.state_numbers), sent * shape.state_numbers


def dealt_bytes(layout: Layout, shape: RecurrenceShape) -> tuple[float, float]:
    """Bytes that a rank sends by the exchange in one pass: its rows, and outputs of heads to where they came from."""
    ranks = layout.mesh.sequence_size
    rows = max(layout.tokens(rank) for rank in range(ranks)) * shape.itemsize * (ranks - 1) / ranks
    back = rows * shape.heads * shape.value_dim
    return rows * shape.row_numbers(ranks) - back, back


def prices(layout: Layout, shape: RecurrenceShape, machine: Machine | None = None) -> tuple[RoutePrice, RoutePrice]:
    """Of the scan and of the exchange."""
    machine = layout.mesh.planned_for(machine)
    ranks = layout.mesh.sequence_size
    link = machine.link_class(0, ranks - 1)
    sent = sum(gathered_bytes(layout, shape))
    # The states of M and U once, and the outputs again in the backward pass.
    again = kernel_seconds(shape, max(map(sum, _cut_rows(layout))) * (2 + map_share(shape)), machine)
    scan = 2 * transfer_seconds(machine, sent / 2, link, "all_to_all") + again
    moved = 2 * sum(dealt_bytes(layout, shape))
    # Where heads do not divide by the ranks, the rank with most of them computes longer.
    uneven = -(-shape.heads // ranks) * ranks / shape.heads - 1
    tokens = max(layout.tokens(rank) for rank in range(ranks))
    swapped = 8 * transfer_seconds(machine, moved / 8, link, "all_to_all")
    swapped += kernel_seconds(shape, uneven * tokens * 3, machine)
    return RoutePrice("scan", float(scan), sent), RoutePrice("exchange", float(swapped), moved)


def _cut_rows(layout: Layout) -> list[list[int]]:
    """Sizes of every rank's pieces of cut documents."""
    documents = by_document(pieces_of(layout)).values()
    cut = [piece for parts in documents if len(parts) > 1 for piece in parts]
    return [[piece.size for piece in cut if piece.rank == rank] for rank in range(layout.mesh.sequence_size)]


def cheaper_route(layout: Layout, shape: RecurrenceShape, machine: Machine | None = None) -> str:
    """The route that takes less; the scan where no document is cut, since it then moves nothing."""
    return min(prices(layout, shape, machine), key=lambda price: price.seconds).route
