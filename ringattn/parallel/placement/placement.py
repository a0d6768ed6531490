"""Who holds which tokens of some documents on one ring × ulysses mesh."""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from ringattn.documents import Documents
from ringattn.kept import without_kept
from ringattn.kernels.spec import Range
from ringattn.mask import Mask
from ringattn.parallel.geometry.ranges import length, overlap
from ringattn.parallel.machine.machine import Machine
from ringattn.parallel.mesh.shape import MeshShape
from ringattn.parallel.placement import policies
from ringattn.parallel.placement.load import Load
from ringattn.parallel.placement.parts import compact, spread
from ringattn.tracing import untraced

POLICIES = ("contiguous", "zigzag", "balanced", "auto")


class Placement:
    """The placement of `docs` over the sequence ranks of `mesh`, whose degrees are settled. Pure integers.

    Tokens are placed on ring positions; a position's tokens are dealt in equal runs to its ulysses ranks. Not to be
    changed. No dataclass, since FSDP takes those in a model's keywords apart.

    Arguments:
        docs: documents, where they are in the whole stream.
        policy, machine, head_dim, speeds: see `Layout`.
        masks: masks of the model with the number of layers that each has.
        tokens: ascending ranges of the stream that are placed, with all of `docs` in them; default: the whole stream.
    """

    def __init__(
        self,
        docs: Documents,
        mesh: MeshShape,
        policy: str = "auto",
        masks: Sequence[tuple[Mask, float]] = ((Mask(), 1.0),),
        *,
        machine: Machine | None = None,
        head_dim: int = 128,
        speeds: Sequence[float] | None = None,
        tokens: Sequence[Range] | None = None,
    ) -> None:
        self.docs, self.mesh, self.policy = docs, mesh, resolved(policy, mesh)
        self.placed = None if tokens is None else tuple(tokens)
        self.speeds = None if speeds is None else _checked_speeds(speeds, mesh, self.policy)
        timed = machine or (mesh.machine if policy == "auto" else None)
        self.masks = tuple(masks)
        rates = () if timed is None else (timed.rate(head_dim, False), timed.rate(head_dim, True))
        self.load = Load(self.masks, rates, 2 * head_dim)

    def __getstate__(self) -> dict[str, Any]:
        return without_kept(self)

    @cached_property
    def held(self) -> Documents:
        """The documents in a stream of the placed tokens alone."""
        return self.docs if self.placed is None else compact(self.docs, self.placed)

    @cached_property
    @untraced
    def positions(self) -> policies.Positions:
        """Ordered global ranges `(start, stop)` of every ring position."""
        if self.policy == "balanced":
            found = policies.balanced(self.held, self.load, self.mesh.ring, self.speeds)
        else:
            place = {"contiguous": policies.contiguous, "zigzag": policies.zigzag}[self.policy]
            found = place(self.held, self.load, self.mesh.ring)
        return found if self.placed is None else spread(found, self.placed)

    @cached_property
    def position_sizes(self) -> tuple[int, ...]:
        return tuple(length(ranges) for ranges in self.positions)

    def deal(self, position: int) -> tuple[Range, ...]:
        """Rows of a ring position that each of its ulysses ranks holds."""
        rows, ranks = self.position_sizes[position], self.mesh.ulysses
        return tuple((rank * rows // ranks, (rank + 1) * rows // ranks) for rank in range(ranks))

    def ranges(self, rank: int) -> tuple[Range, ...]:
        """Ordered global ranges held by a sequence rank."""
        position, part = divmod(rank, self.mesh.ulysses)
        begin, end = self.deal(position)[part]
        out, row = [], 0
        for start, stop in self.positions[position]:
            first, last = overlap((begin - row, end - row), (0, stop - start))
            if first < last:
                out.append((start + first, start + last))
            row += stop - start
        return tuple(out)

    def tokens(self, rank: int) -> int:
        """Number of tokens held by a sequence rank."""
        begin, end = self.deal(rank // self.mesh.ulysses)[rank % self.mesh.ulysses]
        return end - begin

    def __str__(self) -> str:
        head = f"{self.held} on ring {self.mesh.ring} × ulysses {self.mesh.ulysses}, {self.policy}"
        rows = [
            f"  position {index}: {size} tokens in {len(ranges)} ranges"
            for index, (size, ranges) in enumerate(zip(self.position_sizes, self.positions, strict=True))
        ]
        return "\n".join([head, *rows])


def resolved(policy: str, mesh: MeshShape) -> str:
    """What "auto" stands for on a mesh."""
    if policy != "auto":
        return policy
    return "balanced" if mesh.ring > 1 else "contiguous"


def _checked_speeds(speeds: Sequence[float], mesh: MeshShape, policy: str) -> tuple[float, ...]:
    if policy != "balanced":
        raise ValueError(f'speeds belongs to policy="balanced", got policy="{policy}"')
    if len(speeds) != mesh.ring or not all(0 < speed < math.inf for speed in speeds):
        raise ValueError(f"speeds must be {mesh.ring} positive numbers, one per ring position, got {list(speeds)}")
    return tuple(float(speed) for speed in speeds)
