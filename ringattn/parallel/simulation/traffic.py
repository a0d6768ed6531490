"""Who sends how many bytes to whom in each batch of transfers of a pass, as the executor posts them. Pure."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ringattn.parallel.plan.exchange import Exchange
from ringattn.parallel.plan.messages import Widths, exchange_messages
from ringattn.parallel.plan.plan import AttentionPlan
from ringattn.parallel.plan.shape import Shape


class BatchKey(NamedTuple):
    """The name of transfers that a rank posts together: the "cast" or "reduce" of a stage, for one chunk of heads, or
    the "exchange" of heads, which has stage 0 before the stages of the plan and 1 after them."""

    kind: str
    stage: int
    chunk: int = 0


@dataclass(frozen=True)
class Traffic:
    """The transfers of one pass. Ranks are sequence ranks.

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

    def peers(self, key: BatchKey, rank: int) -> list[int]:
        """Whom the rank exchanges anything with in a batch."""
        plan = self.plans[rank]
        if key.kind == "exchange":
            first = rank - rank % self.ulysses
            return [peer for peer in range(first, first + self.ulysses) if peer != rank]
        stage = plan.stages[key.stage]
        return sorted({self._rank(rank, message.peer) for message in (*stage.sends, *stage.receives)})

    def sent(self, key: BatchKey, rank: int) -> list[tuple[int, float]]:
        """Receivers and bytes of what the rank sends in a batch, nearest on the ring first."""
        plan = self.plans[rank]
        if key.kind == "exchange":
            return self._exchanged(plan.exchange, key, rank)
        own, stage, cast = plan.own(self.shape), plan.stages[key.stage], key.kind == "cast"
        row_bytes = own.key_row_bytes if cast else own.returned_row_bytes(plan.wide_reduce)
        rows: dict[int, int] = defaultdict(int)
        for message in stage.sends if cast else stage.receives:
            rows[message.peer] += message.rows
        order = sorted(rows, key=lambda peer: (peer - plan.ring_rank) % plan.ring)
        return [(self._rank(rank, peer), rows[peer] * row_bytes) for peer in order]

    def batches(self, kind: str) -> list[BatchKey]:
        """All of one kind."""
        plan = self.plans[0]
        if kind == "exchange":
            return [BatchKey(kind, 0), BatchKey(kind, 1)] if self.ulysses > 1 else []
        return [
            BatchKey(kind, stage, chunk) for chunk in range(plan.head_chunks) for stage in range(1, len(plan.stages))
        ]

    def collectives(self, key: BatchKey, rank: int) -> int:
        """How many messages a batch is: two where gradients of keys travel wider than those of queries."""
        exchange = self.plans[rank].exchange
        return 1 if exchange is None or key.kind != "exchange" else len(self._messages(exchange, key, rank))

    def _messages(self, exchange: Exchange, key: BatchKey, rank: int) -> list[Widths]:
        return exchange_messages(exchange, self.shape, self.backward, self.plans[rank].wide_reduce)[key.stage]

    def _exchanged(self, exchange: Exchange | None, key: BatchKey, rank: int) -> list[tuple[int, float]]:
        """Queries, keys and values one way (or their gradients the other), the output or its gradient back."""
        if exchange is None:
            return []
        own, out = exchange.rank, []
        messages = self._messages(exchange, key, rank)
        for step in range(1, len(exchange.rows)):
            peer = (own + step) % len(exchange.rows)
            # Exchange 0 brings a rank's rows to the peer's heads, exchange 1 the peer's rows from the rank's heads.
            (start, stop), heads = exchange.rows[peer if key.stage else own], exchange.heads[own if key.stage else peer]
            row = sum(heads.queries * query + len(heads.keys) * key_head for query, key_head in messages)
            out.append((rank - own + peer, (stop - start) * row))
        return out

    def _rank(self, rank: int, position: int) -> int:
        """The rank of a ring position with the same place in its ulysses group."""
        return position * self.ulysses + rank % self.ulysses
