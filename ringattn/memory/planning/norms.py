"""What the norms of one layer keep, and what is there while one is computed, forward and backward."""

from dataclasses import dataclass

from ringattn.memory.planning.shapes import ModelShape

WIDE = 4  # bytes of float32, in which norms are computed


@dataclass(frozen=True)
class NormUse:
    """A norm of hidden states on a rank, in bytes.

    Arguments:
        tokens: of the rank.
        itemsize: bytes of an element of what is computed.
        kernel: a norm is one kernel, which keeps its input as it is.
    """

    model: ModelShape
    tokens: int
    itemsize: int
    kernel: bool

    @property
    def forward(self) -> int:
        """What it holds beside its input: two tensors in float32, or its result alone. What has no mean is another
        than a copy of its input."""
        if self.kernel:
            return self._stream
        return (2 + (self._centred and self.itemsize < WIDE)) * self._wide_stream

    @property
    def backward(self) -> int:
        """Three gradients, a factor and a product in float32; in one kernel two gradients as they are."""
        return 2 * self._stream if self.kernel else 5 * self._wide_stream

    @property
    def copy(self) -> int:
        """Its input, which its gradient needs: in float32, unless one kernel reads it as it is. Without its mean it is
        there twice, for its square and for the product."""
        return self._stream if self.kernel else self._wide_stream * (1 + self._centred)

    @property
    def keeps_input(self) -> bool:
        """Whether that is the input itself, and no copy."""
        return self.kernel or (self.itemsize == WIDE and not self._centred)

    @property
    def kept(self) -> int:
        """What autograd keeps for it, its result apart."""
        return self.copy + self._normed

    @property
    def saved(self) -> int:
        """That, what is multiplied by the weight, and the result; without a norm what would go into it."""
        return self._stream if not self.model.norms_before else self.kept + self._stream

    @property
    def after(self) -> int:
        """Of a norm behind a part, whose result nothing needs, and whose input is kept for it alone."""
        return self.model.norms_after * self.kept

    @property
    def _normed(self) -> int:
        """What is multiplied by a norm's weight; in one kernel it is not kept."""
        if self.kernel:
            return 0
        return self._wide_stream if self.model.norms.wide else self._stream

    @property
    def _centred(self) -> bool:
        return self.model.norms.centred and not self.kernel

    @property
    def _stream(self) -> int:
        return self.tokens * self.model.hidden * self.itemsize

    @property
    def _wide_stream(self) -> int:
        return self.tokens * self.model.hidden * WIDE
