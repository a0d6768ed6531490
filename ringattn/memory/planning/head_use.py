"""What the queries, keys and values of one layer are made of."""

from dataclasses import dataclass

from ringattn.memory.planning.parts import HeadBytes
from ringattn.memory.planning.shapes import ModelShape
from ringattn.memory.settings import MemorySettings

WIDE = 4  # bytes of float32, in which norms are computed


@dataclass(frozen=True)
class HeadUse:
    """Those of one layer on a rank, in bytes; not of latents.

    By numbers that were found by running the layer's own code (`ModelShape.made`), where there are such and elementwise
    work is no kernel of its own; else for one product each, perhaps with a norm, turned by halves.

    Arguments:
        tokens: of the rank.
        itemsize: bytes of an element of what is computed.
        fused: norms and rotary embeddings are one kernel each, which keep their inputs as they are.
    """

    model: ModelShape
    tokens: int
    itemsize: int
    memory: MemorySettings
    fused: bool

    @property
    def narrow(self) -> int:
        """Products that `keep="selective"` keeps, without the one after attention."""
        m = self.model
        every = m.query_width * (1 + m.gated_attention) + m.key_width + m.value_width
        return self._bytes(every if m.head_products is None else m.head_products)

    @property
    def saved(self) -> int:
        """What autograd keeps of them beside these, norms of heads among it. The inputs of norms may be products that
        are kept anyhow, and no copies in float32."""
        selective = self.memory.keep == "selective"
        if self._found is not None:
            return self._of_token(self._found.kept - selective * self._found.products)
        heads = self.model.head_norms * (self.model.query_width + self.model.key_width)
        normed = 0 if self.fused else WIDE + (WIDE - self.itemsize) * self.model.norms.wide
        anyhow = selective and (self.fused or self.itemsize == WIDE)
        return self._bytes(heads) * (not anyhow) + self.tokens * heads * normed

    @property
    def normed(self) -> int:
        """What is there while queries go through a norm, where that is told apart."""
        if not self.model.head_norms or self._found is not None:
            return 0
        wide = 2 * (self.itemsize if self.fused else WIDE)
        return (self.itemsize + wide) * self.tokens * self.model.query_width + self._gate

    @property
    def turned(self) -> int:
        """The most until they are there."""
        if self._found is not None:
            return self._of_token(self._found.forward)
        # Of queries what is turned, its half and the sum; then of keys the same, beside the queries.
        queries, keys = self.model.query_width, self.model.key_width
        more = queries + (keys if self.fused else max(2 * queries, 3 * keys))
        return self._heads + self._gate + self._bytes(more)

    @property
    def attended(self) -> int:
        """What is there while attention is computed: these, and what they are made of as far as it stays."""
        if self.model.made is None:
            return self._heads + self._gate
        return self._heads + self._of_token(self.model.made[self.itemsize != WIDE].beside)

    @property
    def left(self) -> int:
        """What of that is there when attention is over, with a gate's values and product."""
        if self._found is not None and self.memory.keep != "all":
            return self._of_token(self._found.after) + self._gate
        return self.attended + (1 + (self.model.made is None)) * self._gate

    @property
    def backward(self) -> int:
        """The most on the way back from their gradients, beside what was saved; 0 where attention needs more."""
        return 0 if self._found is None else self._of_token(self._found.backward) - self.saved

    @property
    def _found(self) -> HeadBytes | None:
        return None if self.model.made is None or self.fused else self.model.made[self.itemsize != WIDE]

    @property
    def _heads(self) -> int:
        m = self.model
        return self._bytes(m.query_width + m.key_width + m.value_width)

    @property
    def _gate(self) -> int:
        return self._bytes(self.model.out_width) * self.model.gated_attention

    def _bytes(self, width: int) -> int:
        """Of so many elements a token."""
        return self.tokens * width * self.itemsize

    def _of_token(self, size: float) -> int:
        """Of all tokens, with so many bytes each."""
        return round(self.tokens * size)
