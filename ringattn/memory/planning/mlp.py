"""What the MLP of one layer keeps, and what is alive while it is computed, forward and backward.

Counted are the tensors of transformers' MLPs of two or three products, and of its experts by grouped products.
"""

from dataclasses import dataclass

from ringattn.memory.planning.parts import PLAIN_GATE, Mlp
from ringattn.memory.settings import MemorySettings

WIDE = 4  # bytes of float32
INDEX = 8  # bytes of an integer
PLACES = 5  # of a copy: its expert, that in order, its place, that by tokens, and the place where it came from


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
        if self._tiled:
            return 0
        return self._kept * self._rows + 2 * self._copies + self._routers + self._shared * self.part.shared_gate

    @property
    def narrow(self) -> int:
        """Its products that `keep="selective"` keeps."""
        return 0 if self._tiled else self.tokens * self.part.narrow * self.itemsize

    @property
    def forward(self) -> int:
        """The activation, the other product, and theirs; in tiles also the output of all and of one."""
        graph = self.memory.keep == "all" and not self._tiled
        rows = self._rows if graph else self._rows_at_once
        rows *= self._made + self._biases + graph * self._left_over
        # Of experts what goes in, what comes out, that by its weight, and back in the order of tokens.
        kept = self._kept * self._rows * graph + 2 * self._copies
        given = kept + self._copies * self.part.biased + 2 * self._wide_copies
        beside = (self._routers if graph else self._places) + self._shared
        return max(rows + self._copies, given) + beside + self._outputs

    @property
    def backward(self) -> int:
        """Backward of the product of two: both factors and the input of one, its gradient and theirs."""
        rows = (self._kept + 2 if self.part.gated else self.part.back) * self._rows
        # Of experts first the gradient of their sum, its zeros, and that in their order, beside what was kept.
        first = self._kept * self._rows + 2 * self._copies + 3 * self._wide_copies
        gated = 2 * self._shared * self.part.shared_gate  # it, and the gradient of what comes of it
        return max(rows + self._copies, first, self._again) + self._routers + gated + self._outputs

    @property
    def _again(self) -> int:
        """Of experts whose rows are computed again: they are there with what nothing keeps, and with the gradient of
        their sum, which autograd copies for each before it asks for what it kept."""
        if self.memory.keep == "all" and not self._tiled:
            return 0
        rows = max(self._kept, self._made) + self._left_over
        made = (rows + self._biases) * self._rows + self._copies
        given = self._kept * self._rows + (2 + self.part.biased) * self._copies + 2 * self._wide_copies
        return max(made, given) + self._wide_copies

    @property
    def _made(self) -> int:
        """Tensors of inner rows when the last of them is made, where nothing is kept. Halves of one product stay as
        long as either."""
        if not self.part.gated:
            return 1 + self.part.steps
        return self.part.kept - (not self.part.joined)

    @property
    def _left_over(self) -> int:
        """Of a gate of its own kind a factor that no gradient needs is there until it is over."""
        return int(self.part.kept > PLAIN_GATE)

    @property
    def _biases(self) -> int:
        """Tensors of inner rows in copies of experts' biases, of two products where they are gated."""
        return self.part.biased * (1 + self.part.gated)

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
    def _rows_at_once(self) -> int:
        """Of these the most that are there where nothing is kept: those of shared experts go before others come."""
        inner, shared = self.part.inner, self.part.shared
        return self._tile * max(inner - shared, shared) * self.itemsize

    @property
    def _copies(self) -> int:
        """A tile's tokens, each as often as experts see it."""
        return self._tile * self.hidden * self.part.routed * self.itemsize

    @property
    def _wide_copies(self) -> int:
        """The same by their weights."""
        return self._copies * (WIDE if self.part.wide_weights else self.itemsize) // self.itemsize

    @property
    def _routers(self) -> int:
        """What is kept for them: places of copies, and a tile's tokens in float32, where they are not in that."""
        copied = self.hidden * WIDE * (self.part.wide_router and self.itemsize < WIDE)
        return self._places + self._tile * copied

    @property
    def _places(self) -> int:
        """Which experts a tile's tokens go to, and in which order."""
        return self._tile * self.part.routed * PLACES * INDEX

    @property
    def _kept(self) -> int:
        """Tensors of inner rows that autograd keeps. Experts' gates are no kernels of their own."""
        return self.part.kept - (self.fused and self.part.gated and not self.part.routed)

    @property
    def _shared(self) -> int:
        """What experts of all tokens give."""
        return self._tile * self.hidden * self.itemsize * (self.part.shared > 0)

    @property
    def _outputs(self) -> int:
        """In tiles the output of all and of one; backward the gradients of their inputs."""
        return self._tiled * (self.tokens + self._tile) * self.hidden * self.itemsize
