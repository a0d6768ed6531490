"""Who sends how many bytes to whom in each batch of transfers of a pass, as the executor posts them. Pure.

A batch is named by its kind and stage: "cast" and "reduce" of a stage; "exchange" 0 before and 1 after the stages. The
stages of a second chunk of heads are numbered after those of the first.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ringattn.parallel.plan.exchange import Exchange
from ringattn.parallel.plan.plan import AttentionPlan
from ringattn.parallel.plan.shape import Shape


@dataclass(frozen=True)
class Traffic:
    """Of one pass. Ranks are sequence ranks.

    Arguments:
        plans: of every rank, those that the pass walks.
        shape: the model's.
    """

    plans: Sequence[AttentionPlan]
    shape: Shape
    backward: bool

    @property
    def ulysses(self) -> int:
        exchange = self.plans[0].exchange
        return 1 if exchange is None else len(exchange.rows)

    def peers(self, kind: str, stage: int, rank: int) -> list[int]:
        """Whom the rank exchanges anything with in a batch."""
        plan = self.plans[rank]
        if kind == "exchange":
            first = rank - rank % self.ulysses
            return [peer for peer in range(first, first + self.ulysses) if peer != rank]
        walked = plan.stages[stage % len(plan.stages)]
        return sorted({self._rank(rank, message.peer) for message in (*walked.sends, *walked.receives)})

    def sent(self, kind: str, stage: int, rank: int) -> list[tuple[int, float]]:
        """Receivers and bytes of what the rank sends in a batch, nearest on the ring first."""
        plan = self.plans[rank]
        if kind == "exchange":
            return self._exchanged(plan.exchange, stage, rank)
        own, walked = plan.own(self.shape), plan.stages[stage % len(plan.stages)]
        row_bytes = own.wide_key_row_bytes if kind == "reduce" and plan.wide_reduce else own.key_row_bytes
        rows: dict[int, int] = defaultdict(int)
        for message in walked.sends if kind == "cast" else walked.receives:
            rows[message.peer] += message.rows
        order = sorted(rows, key=lambda peer: (peer - plan.ring_rank) % plan.ring)
        return [(self._rank(rank, peer), rows[peer] * row_bytes) for peer in order]

    def later(self) -> list[int]:
        """The numbers of all stages that have casts and reduces."""
        plan = self.plans[0]
        return [number for number in range(len(plan.stages) * plan.head_chunks) if number % len(plan.stages)]

    def collectives(self, stage: int, rank: int) -> int:
        """How many messages exchange 0 or 1 is: two where gradients of keys travel wider than those of queries."""
        return 2 if stage and self.backward and self.plans[rank].sums_copies else 1

    def _exchanged(self, exchange: Exchange | None, stage: int, rank: int) -> list[tuple[int, float]]:
        """Queries, keys and values one way (or their gradients the other), the output or its gradient back."""
        if exchange is None:
            return []
        own, shape, first = exchange.rank, self.shape, rank - exchange.rank
        out = []
        for step in range(1, len(exchange.rows)):
            peer = (own + step) % len(exchange.rows)
            # Exchange 0 brings a rank's rows to the peer's heads, exchange 1 the peer's rows from the rank's heads.
            rows, heads = (
                (exchange.rows[own], exchange.heads[peer]) if not stage else (exchange.rows[peer], exchange.heads[own])
            )
            if bool(stage) != self.backward:
                size: float = heads.queries * shape.value_dim * shape.itemsize
            else:
                wide = shape.wide if self.backward and self.plans[rank].sums_copies else shape.itemsize
                size = heads.queries * shape.head_dim * shape.itemsize
                size += len(heads.keys) * (shape.head_dim + shape.value_dim) * wide
            out.append((first + peer, (rows[1] - rows[0]) * size))
        return out

    def _rank(self, rank: int, position: int) -> int:
        """The rank of a ring position with the same place in its ulysses group."""
        return position * self.ulysses + rank % self.ulysses
