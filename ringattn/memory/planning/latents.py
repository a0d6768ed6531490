"""What attention holds of the latents that its queries, keys and values are made of."""

from dataclasses import dataclass

from ringattn.memory.planning.parts import Latents
from ringattn.memory.planning.shapes import ModelShape

WIDE = 4  # bytes of float32, in which norms are computed


@dataclass(frozen=True)
class LatentUse:
    """Those of one layer on a rank, in bytes.

    Arguments:
        part: in numbers.
        tokens: of the rank.
        itemsize: bytes of an element of what is computed.
        fused: norms are one kernel each, which keeps its input as it is.
        normed_products: inputs of norms are products that are kept anyhow.
    """

    model: ModelShape
    part: Latents
    tokens: int
    itemsize: int
    fused: bool
    normed_products: bool

    @property
    def saved(self) -> int:
        """What autograd keeps: of each its norm's input, which in float32 is a copy, what is multiplied by the norm's
        weight, and the result. The part that is turned stands beside the latent of keys, where that is no copy."""
        width, b = self.part.queries + self.part.keys, self.itemsize
        saved = width * (2 * b if self.fused else WIDE + 2 * b)
        if self.normed_products:
            saved -= width * b
        elif self.fused or b == WIDE:
            saved += self.part.rotary * b
        return self.tokens * saved

    @property
    def held(self) -> int:
        """The same without autograd: of keys alone, and its norm's result."""
        return self._bytes(2 * self.part.keys + self.part.rotary)

    @property
    def joined(self) -> int:
        """What stands beside latents, and beside queries, keys and values as a kernel takes them, until attention is
        over: the parts of which heads are put together, and heads of which those are copies."""
        m, rotary = self.model, self.part.rotary
        turned = self.part.turned * (2 * m.query_width + (m.query_heads + 1) * rotary)
        return self._bytes(turned + 2 * m.key_width - m.key_heads * rotary + m.value_width)

    @property
    def narrow(self) -> int:
        """Products that `keep="selective"` keeps."""
        return self._bytes(self.part.narrow)

    def _bytes(self, width: int) -> int:
        """Of so many elements a token."""
        return self.tokens * width * self.itemsize
