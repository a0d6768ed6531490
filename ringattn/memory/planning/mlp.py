"""What the MLP of one layer keeps, and what is alive while it is computed, forward and backward.

Counted are the tensors of transformers' MLPs of two or three products, and of its experts by grouped products.
"""

from dataclasses import dataclass

from ringattn.memory.planning.parts import Mlp
from ringattn.memory.settings import MemorySettings

WIDE = 4  # bytes of float32, in which gradients of tiles are added up


@dataclass(frozen=True)
class MlpUse:
    """One layer's MLP on a rank, in bytes beside its input.

    Arguments:
        part: in numbers.
        hidden: width of what goes in and comes out.
        tokens: of the rank.
        itemsize: bytes of an element of what is computed.
        fused: activation and product are one kernel, which keeps its inputs as they are.
    """

    part: Mlp
    hidden: int
    tokens: int
    itemsize: int
    memory: MemorySettings
    fused: bool = False

    @property
    def saved(self) -> int:
        """What autograd keeps. In tiles nothing but the norm's result; of experts what goes in and comes out too."""
        return 0 if self._tiled else self._kept_rows * self.tokens + 2 * self._copies

    @property
    def narrow(self) -> int:
        """Its products that `keep="selective"` keeps."""
        return 0 if self._tiled else self.tokens * self.part.narrow * self.itemsize

    @property
    def forward(self) -> int:
        """The activation, the other product, and theirs; in tiles also the output of all and of one."""
        steps = 1 + self.part.gated + self.part.joined + self.part.steps
        rows = steps * self._rows
        # Of experts what goes in, what comes out, that by its weight, and back in the order of tokens.
        kept = self.saved if self.memory.keep == "all" else 2 * self._copies
        return max(rows + self._copies, kept + 2 * self._copies) + self._outputs

    @property
    def backward(self) -> int:
        """Backward of the product of two: both factors and the input of one, its gradient and theirs."""
        rows = (6 - self.fused if self.part.gated else 3 + self.part.steps) * self._rows
        # Of experts first the gradient of their sum, its zeros, and that in their order, beside what was kept.
        return max(rows + self._copies, self._kept_rows * self._tile + 5 * self._copies) + self._outputs

    @property
    def last_share(self) -> float:
        """The share of its gradients that is there at the fullest moment of its backward pass: that of the product
        that comes last. In tiles they are counted apart."""
        return 0.0 if self._tiled else 1 / self.part.products

    @property
    def tile_grads(self) -> int:
        """Of tiles: sums of gradients in float32, and the first gradient of a tile; when the others come, the tile's
        rows have gone."""
        products = self.part.products
        return self._tiled * self.part.weights.trained * (WIDE * products + self.itemsize) // products

    @property
    def _tile(self) -> int:
        """Tokens of a tile."""
        return min(self.tokens, self.memory.mlp_tile or self.tokens)

    @property
    def _tiled(self) -> bool:
        return self._tile < self.tokens

    @property
    def _rows(self) -> int:
        """A tile's inner rows."""
        return self._tile * self.part.inner * self.itemsize

    @property
    def _copies(self) -> int:
        """A tile's tokens, each as often as experts see it."""
        return self._tile * self.hidden * self.part.routed * self.itemsize

    @property
    def _kept_rows(self) -> int:
        """Of a token's inner rows what autograd keeps: both products, the activation and the product of both."""
        return (4 - self.fused if self.part.gated else 2) * self.itemsize * self.part.inner

    @property
    def _outputs(self) -> int:
        """In tiles the output of all and of one; backward the gradients of their inputs."""
        return self._tiled * (self.tokens + self._tile) * self.hidden * self.itemsize
