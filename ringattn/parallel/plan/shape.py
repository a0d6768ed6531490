"""Heads and dims of an attention."""

from dataclasses import dataclass, replace

from ringattn.parallel.plan.exchange import Exchange


@dataclass(frozen=True)
class Shape:
    """Heads and dims of an attention as the model has them, before any exchange; `itemsize` is bytes per element."""

    query_heads: int
    key_heads: int
    head_dim: int
    value_dim: int
    itemsize: int = 2

    def share(self, exchange: Exchange | None) -> "Shape":
        """What one rank computes: after the exchange its own heads."""
        if exchange is None:
            return self
        heads = exchange.share
        return replace(self, query_heads=heads.queries, key_heads=len(heads.keys))

    def chunk(self, chunks: int) -> "Shape":
        """The heads of one of so many equal chunks."""
        return replace(self, query_heads=self.query_heads // chunks, key_heads=self.key_heads // chunks)

    @property
    def key_row_bytes(self) -> int:
        """Bytes of one token's key and value."""
        return self.key_heads * (self.head_dim + self.value_dim) * self.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's query, key, value and output."""
        return (self.query_heads + self.key_heads) * (self.head_dim + self.value_dim) * self.itemsize

    @property
    def wide(self) -> int:
        """Bytes per element of sums."""
        return max(4, self.itemsize)

    @property
    def wide_key_row_bytes(self) -> int:
        """Bytes of the sums of one token's key and value gradients."""
        return self.key_row_bytes * self.wide // self.itemsize

    def returned_row_bytes(self, wide_reduce: bool) -> int:
        """Bytes of one token's key and value gradients where they travel: in the dtype of sums, or of the keys."""
        return self.wide_key_row_bytes if wide_reduce else self.key_row_bytes
