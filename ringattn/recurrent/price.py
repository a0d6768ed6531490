"""What the two routes of a recurrence take, and which is cheaper. Pure numbers, the same on every rank.

The scan moves (M, U) of the pieces of cut documents, whose size does not depend on their length, and runs cut pieces
more than once. The exchange moves every token's rows and computes nothing twice.

The scan's rounds (`ringattn.recurrent.rounds`) are chosen here. A piece of 32 heads of 128 × 128 has an M and a U of
2 MiB each. MiB that the rank which takes most receives in a layer, forward, with 16,384 tokens a rank on H200s:

    ranks, layout                      all gathered      in one round    in rounds
      8, one document, zigzag            56 + 32                54        54 in 1
     64, one document, contiguous       252 + 128              250        38 in 3
     64, one document, zigzag           504 + 256              502        54 in 7
     64, a pack, balanced             1,512 + 768              158        90 in 5
    256, one document, contiguous     1,020 + 512            1,018        50 in 4
    256, one document, zigzag         2,040 + 1,024          2,038        70 in 9
    256, a pack, balanced             7,140 + 3,584            144        98 in 4

Gathered are all pairs by all ranks, in as many places as the rank with most pieces has, and M is kept for the backward
pass (after the +). In one round a rank takes those before its own pieces. The pack has documents of 512 to 131,072
tokens. The backward pass moves as much again: M once more, so that none but a rank's own is kept. A gather in groups of
heads would bound the memory and move as much, 2 GiB a layer at 256 ranks, for a kernel of 1 ms: rounds bound both.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ringattn.parallel.layout import Layout
from ringattn.parallel.machine.machine import Machine, transfer_seconds
from ringattn.recurrent.plan import Piece, chains_of, roles_of
from ringattn.recurrent.rounds import Place, is_state, taken

ROUTES = ("scan", "exchange")
# Tokens of a chunk, and what part of an attention kernel's rate the products of a recurrence reach, forward and
# backward: matrices are small, and most of the time goes to reading and writing. On an H200, with 32 heads of 128 in
# bfloat16, 0.074 by flash-linear-attention's gated delta rule and 0.068 by mamba-ssm
# (benchmarks/results/recurrent-h200.md).
CHUNK, RATE = 64, 0.07
# How often what the exchange moves is copied on the device, of q and k, v and outputs in both passes on average: q
# beside k, side by side for each rank, into rows again, and into the order of the stream.
COPIES = 2.3


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
    """What a layer takes, forward and backward.

    Arguments:
        seconds: beside the kernel on an even share, of the slowest rank.
        sent: bytes of the rank that moves most.
        rounds: of transfers, one after another, in each direction.
    """

    route: str
    seconds: float
    sent: float
    rounds: int = 1


def kernel_seconds(shape: RecurrenceShape, rows: float, machine: Machine) -> float:
    """Of a layer's kernel on so many rows, forward."""
    return rows * shape.flops / (machine.rate(shape.key_dim, False).flops * RATE)


def map_share(shape: RecurrenceShape) -> float:
    """What the map of a piece takes beside its last state, by what that takes: columns of keys beside values."""
    return shape.key_dim / shape.value_dim if shape.delta else 0.0


def dealt_bytes(layout: Layout, shape: RecurrenceShape) -> tuple[float, float]:
    """Bytes that a rank sends by the exchange in one pass: its rows, and outputs of heads to where they came from."""
    ranks = layout.mesh.sequence_size
    rows = max(layout.tokens(rank) for rank in range(ranks)) * shape.itemsize * (ranks - 1) / ranks
    back = rows * shape.heads * shape.value_dim
    return rows * shape.row_numbers(ranks) - back, back


def copy_seconds(sent: float, ranks: int, machine: Machine) -> float:
    """Of the exchange's copies on a device that sends so many bytes to others, and its own share too."""
    return COPIES * 2 * sent * ranks / max(1, ranks - 1) / machine.copy_bandwidth


def prices(layout: Layout, shape: RecurrenceShape, machine: Machine | None = None) -> tuple[RoutePrice, RoutePrice]:
    """Of the scan and of the exchange."""
    machine = layout.mesh.planned_for(machine)
    ranks = layout.mesh.sequence_size
    link = machine.link_class(0, ranks - 1)
    moved = 2 * sum(dealt_bytes(layout, shape))
    # Where heads do not divide by the ranks, the rank with most of them computes longer.
    uneven = -(-shape.heads // ranks) * ranks / shape.heads - 1
    tokens = max(layout.tokens(rank) for rank in range(ranks))
    swapped = 8 * transfer_seconds(machine, moved / 8, link, "all_to_all") + copy_seconds(moved, ranks, machine)
    swapped += kernel_seconds(shape, uneven * tokens * 3, machine)
    return _scanned(layout, shape, machine), RoutePrice("exchange", float(swapped), moved)


def cheaper(priced: tuple[RoutePrice, RoutePrice]) -> str:
    """The route that takes less; the scan where no document is cut, since it then moves nothing."""
    return min(priced, key=lambda price: price.seconds).route


def received(layout: Layout, shape: RecurrenceShape, rounds: int) -> tuple[float, ...]:
    """Bytes of each round of one pass, of the rank that receives most in it."""
    out = []
    for number in range(rounds):
        numbers: dict[int, int] = defaultdict(int)
        for chain in chains_of(layout):
            for rank, positions in _positions(chain).items():
                numbers[rank] += _arriving(len(chain), positions, rounds, number, shape)
        out.append(float(max(4, shape.itemsize) * max(numbers.values(), default=0)))
    return tuple(out)


class RoundTimes(NamedTuple):
    """Seconds of a walk of states in one pass.

    Arguments:
        transfers: of each round.
        composing: of the products of maps, all rounds together.
        size: bytes of all rounds.
    """

    transfers: tuple[float, ...]
    composing: float
    size: float


def round_times(layout: Layout, shape: RecurrenceShape, rounds: int, machine: Machine) -> RoundTimes:
    """Of the rank that receives most."""
    link = machine.link_class(0, layout.mesh.sequence_size - 1)
    sizes = received(layout, shape, rounds)
    times = tuple(float(transfer_seconds(machine, size, link, "all_to_all")) for size in sizes)
    if not shape.delta:
        return RoundTimes(times, 0.0, sum(sizes))
    pairs = sum(sizes) / (max(4, shape.itemsize) * (shape.map_numbers + shape.state_numbers))
    rows = 2.0 * shape.map_numbers * (shape.key_dim + shape.value_dim) / shape.flops  # as many as a product is worth
    return RoundTimes(times, pairs * kernel_seconds(shape, rows, machine), sum(sizes))


class ScanWork(NamedTuple):
    """Kernel passes times rows of every rank in one pass of the scan, as the table in `ringattn.recurrent.scan` has it.

    Arguments:
        opening: before the first round leaves.
        whole, beside: while it is under way: whole documents, and what else there is.
        closing: after the last round.
    """

    opening: tuple[float, ...]
    whole: tuple[float, ...]
    beside: tuple[float, ...]
    closing: tuple[float, ...]


def scan_work(layout: Layout, shape: RecurrenceShape, backward: bool) -> ScanWork:
    """A forward pass over a row counts 1 and a backward one 2. Only middle pieces make maps, and R backward."""
    rows = [[_tokens(part) for part in (one.whole, one.firsts, one.middles, one.lasts)] for one in roles_of(layout)]
    if backward:
        found = [(3.0 * (m + last), 2.0 * w, 1.0 * f, 2.0 * (f + m)) for w, f, m, last in rows]
    else:
        share = map_share(shape)
        found = [(f + (1 + share) * m, 1.0 * w, 0.0, 1.0 * (m + last)) for w, f, m, last in rows]
    return ScanWork(*zip(*found, strict=True))


def _scanned(layout: Layout, shape: RecurrenceShape, machine: Machine) -> RoutePrice:
    """Of the number of rounds that is quickest."""
    work = [scan_work(layout, shape, backward) for backward in (False, True)]
    even = 3 * kernel_seconds(shape, max(map(layout.tokens, range(layout.mesh.sequence_size))), machine)
    found = []
    for rounds in range(1, _most_rounds(layout) + 1):
        times = round_times(layout, shape, rounds, machine)
        seconds = sum(_slowest(one, times, shape, machine) for one in work)
        found.append(RoutePrice("scan", seconds - even, 2 * times.size, rounds))
    return min(found, key=lambda price: price.seconds)


def _slowest(work: ScanWork, times: RoundTimes, shape: RecurrenceShape, machine: Machine) -> float:
    """Until the last rank has ended a pass; the first round leaves when the last rank has opened."""
    opening, whole, beside, closing = ([kernel_seconds(shape, rows, machine) for rows in part] for part in work)
    first, *later = times.transfers
    arrived = max(opening) + first if first else 0.0
    met = [max(arrived, sum(own)) for own in zip(opening, whole, beside, strict=True)]
    if any(later):
        met = [max(met) + sum(later)] * len(met)
    return max(a + times.composing + b for a, b in zip(met, closing, strict=True))


def _most_rounds(layout: Layout) -> int:
    """As many as doubling takes."""
    longest = max(map(len, chains_of(layout)), default=0)
    return max(1, (longest - 2).bit_length()) if longest > 1 else 1


def _positions(chain: Sequence[Place]) -> dict[int, list[int]]:
    """Of each rank's pieces in a document."""
    found: dict[int, list[int]] = defaultdict(list)
    for position, (rank, _) in enumerate(chain):
        found[rank].append(position)
    return found


def _arriving(pieces: int, positions: Sequence[int], rounds: int, number: int, shape: RecurrenceShape) -> int:
    """Numbers that the pieces of one document on one rank take in a round; what several of them take comes once."""
    if rounds == 1:  # of one round all: at many ranks too many to enumerate
        return (max(positions) - 1) * shape.map_numbers * (max(positions) > 1) + max(positions) * shape.state_numbers
    givers = {other for position in positions for other in taken(pieces, position, rounds, number)}
    maps = sum(not is_state(pieces, giver, rounds, number) for giver in givers)
    return maps * shape.map_numbers + len(givers) * shape.state_numbers


def _tokens(pieces: Sequence[Piece]) -> int:
    return sum(piece.size for piece in pieces)
