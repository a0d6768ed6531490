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

from ringattn.parallel.layout import Layout
from ringattn.parallel.machine.machine import Machine, transfer_seconds
from ringattn.recurrent.plan import Piece, chains_of, roles_of
from ringattn.recurrent.rounds import Place, is_state, taken

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


def prices(layout: Layout, shape: RecurrenceShape, machine: Machine | None = None) -> tuple[RoutePrice, RoutePrice]:
    """Of the scan and of the exchange."""
    machine = layout.mesh.planned_for(machine)
    ranks = layout.mesh.sequence_size
    link = machine.link_class(0, ranks - 1)
    flops = machine.rate(shape.key_dim, False).flops * RATE
    tokens = max(layout.tokens(rank) for rank in range(ranks))
    moved = 2.0 * tokens * shape.row_numbers(ranks) * shape.itemsize * (ranks - 1) / ranks
    # Where heads do not divide by the ranks, the rank with most of them computes longer.
    uneven = -(-shape.heads // ranks) * ranks / shape.heads - 1
    swapped = 8 * transfer_seconds(machine, moved / 8, link, "all_to_all") + uneven * tokens * 3 * shape.flops / flops
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


def _scanned(layout: Layout, shape: RecurrenceShape, machine: Machine) -> RoutePrice:
    """Of the number of rounds that is quickest. The first of them is under way while whole documents are run."""
    ranks = range(layout.mesh.sequence_size)
    link = machine.link_class(0, ranks[-1])
    second = shape.flops / (machine.rate(shape.key_dim, False).flops * RATE)  # of a token
    roles = roles_of(layout)
    # In passes over a piece: the first ones again in the backward pass, and so the last ones; the middles also for
    # their maps, which has columns for M beside those of U, and a backward pass for R.
    maps = 1 + (shape.key_dim / shape.value_dim if shape.delta else 0.0)
    again = [_tokens(one.firsts) + _tokens(one.lasts) + (maps + 3) * _tokens(one.middles) for one in roles]
    hidden = second * min(_tokens(one.whole) for one in roles)
    product = 2.0 * shape.map_numbers * (shape.key_dim + shape.value_dim) * second / shape.flops if shape.delta else 0.0
    found = []
    for rounds in range(1, _most_rounds(layout) + 1):
        sizes = received(layout, shape, rounds)
        times = [float(transfer_seconds(machine, size, link, "all_to_all")) for size in sizes]
        composed = sum(sizes) / (max(4, shape.itemsize) * (shape.map_numbers + shape.state_numbers)) * product
        seconds = max(0.0, times[0] - hidden) + sum(times[1:]) + composed
        found.append(RoutePrice("scan", 2 * seconds + max(again) * second, 2 * sum(sizes), rounds))
    return min(found, key=lambda price: price.seconds)


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
