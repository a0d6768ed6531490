"""What prices depend on beside a schedule."""

from dataclasses import dataclass, replace
from functools import cached_property

from ringattn.parallel.machine.machine import Machine
from ringattn.parallel.placement.placement import Placement
from ringattn.parallel.plan.exchange import Exchange, exchange_plan
from ringattn.parallel.plan.shape import Shape


@dataclass(frozen=True)
class PriceInputs:
    """What prices depend on beside the pieces.

    Arguments:
        shape: the model's.
        exchange: of one rank of the sequence group, the same one whoever asks.
        head_chunks: see `AttentionPlan`.
        keep_keys: keep cast keys for the backward pass; None: if that is predicted to be faster and there is room.
    """

    machine: Machine
    shape: Shape
    exchange: Exchange | None = None
    keep_keys: bool | None = None
    wide_reduce: bool = True
    head_chunks: int = 1

    def on(self, placement: Placement) -> "PriceInputs":
        """These inputs with the exchange that the mesh of a placement asks for."""
        if placement.mesh.ulysses == 1:
            return replace(self, exchange=None)
        return replace(self, exchange=exchange_plan(placement.deal(0), self.shape.query_heads, self.shape.key_heads, 0))

    @property
    def ulysses(self) -> int:
        return 1 if self.exchange is None else len(self.exchange.rows)

    @cached_property
    def share(self) -> Shape:
        """The largest share of the heads."""
        if self.exchange is None:
            return self.shape
        queries, keys = max((share.queries, len(share.keys)) for share in self.exchange.heads)
        return replace(self.shape, query_heads=queries, key_heads=keys)

    @cached_property
    def own(self) -> Shape:
        """What is computed at a time: one chunk of the largest share."""
        return self.share.chunk(self.head_chunks)
