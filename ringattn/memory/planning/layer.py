"""What one layer keeps, and what is alive while it is computed, forward and backward.

Counted are the tensors that PyTorch holds for the layers of transformers: norms that are computed in float32, rotary
embeddings by halves, an MLP of three products. Bytes are of one rank.

Legend: t local tokens, E hidden size, A and K elements of a token's queries and keys, F inner rows of the MLP, b bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from ringattn.memory.offload import ALIGNMENT, IN_FLIGHT, LEAST
from ringattn.memory.planning.attention import AttentionUse
from ringattn.memory.planning.items import ATTENTION, MLP, NORMS, STREAM, Items
from ringattn.memory.planning.shapes import ModelShape
from ringattn.memory.settings import MemorySettings

WIDE = 4  # bytes of float32, in which norms and sums are computed


@dataclass(frozen=True)
class Layer:
    """One layer of a model on a rank.

    Arguments:
        tokens: of the rank.
        itemsize: bytes of an element of what is computed.
        fused: norms, rotary embeddings and the MLP's product are one kernel each, which keep their inputs as they are.
    """

    model: ModelShape
    tokens: int
    itemsize: int
    memory: MemorySettings
    attention: AttentionUse
    fused: bool = False

    # What stays.

    @property
    def stream(self) -> int:
        """A hidden state: b t E."""
        return self.tokens * self.model.hidden * self.itemsize

    @cached_property
    def tensors(self) -> tuple[int, ...]:
        """Bytes of each tensor that the layer keeps, its input apart from the others."""
        if self.memory.keep == "all":
            return (self.saved,)
        if self.memory.keep == "layer":
            return (self.stream,)
        kept = [self.stream, self._out, self._lse]
        if self.memory.keep == "selective":  # the products before attention and the one after it
            kept += [self._queries, self._keys, self._keys, self.stream]
        return (*kept, self.attention.keys) if self.attention.keys else tuple(kept)

    @property
    def saved(self) -> int:
        """What autograd keeps of a layer that is computed with gradients, beside its input where that is kept."""
        return sum(self._saved_before_mlp.values()) + self._mlp_saved

    # Forward.

    def forward(self) -> Iterator[tuple[str, Items, bool]]:
        """Moments of the forward pass, beside the layer's input; with each, whether what the layer keeps is there then.
        With keep="all" that grows from moment to moment, and is part of these."""
        t, b, m = self.tokens, self.itemsize, self.model
        n, qkv = self.stream, self._qkv
        grows = self.memory.keep == "all"
        normed = {NORMS: (self._first_norms - n) * grows}
        yield "norm", {NORMS: self._norm_forward}, False
        if m.head_norms:
            wide = 2 * (b if self.fused else WIDE)
            yield "norm of queries", {STREAM: n, ATTENTION: (b + wide) * t * m.query_width}, False
        turned = m.query_width + m.key_width if self.fused else 3 * m.query_width
        yield "rotary embedding", _plus(normed, {STREAM: n, ATTENTION: qkv + b * t * turned}), False
        held = qkv + self._out + self._lse
        yield "attention", _plus(normed, {STREAM: n, ATTENTION: held + self.attention.forward}), False
        yield "product after attention", _plus(normed, {STREAM: 2 * n, ATTENTION: held}), False
        attended = {NORMS: self._first_norms * grows, ATTENTION: self._saved_before_mlp[ATTENTION] * grows}
        yield "norm before the MLP", _plus(attended, {STREAM: n, NORMS: self._norm_forward}), True
        if not grows:
            yield "MLP", {STREAM: 2 * n, MLP: self._mlp_forward}, True
            return
        copies = 0 if b == WIDE else n  # in float32 the norm has kept its input
        yield "MLP", _plus(self._saved_before_mlp, {STREAM: copies, MLP: self._mlp_forward}), True
        yield "sum after the MLP", _plus(self._saved_before_mlp, {STREAM: copies + 2 * n, MLP: self._mlp_saved}), True

    @property
    def _mlp_forward(self) -> int:
        """The activation, the other product, and theirs; in tiles also the output of all and of one."""
        rows = (3 if self.model.gated else 2) * self.itemsize * self._tile * self.model.inner
        return rows + self._tiled * (self.stream + self._tile * self.model.hidden * self.itemsize)

    # Backward.

    def backward(self) -> Iterator[tuple[str, Items, float]]:
        """Moments of the backward pass, beside the layer's input and the gradient of its output; with each the share of
        the layer's weights whose gradients are there."""
        m, before = self.model, self._saved_before_mlp
        done = m.mlp.count / m.largest_layer.count
        yield "MLP", _plus(before, {MLP: self._mlp_backward}), 0.0 if self._tiled else done / (3 if m.gated else 2)
        attended = {ATTENTION: before[ATTENTION], NORMS: self._first_norms + self._norm_copy}
        yield "norm before the MLP", _plus(attended, {NORMS: self.norm_backward}), done
        computed = self._attended + self._out + self.attention.backward
        yield "attention", {NORMS: self._first_norms, ATTENTION: computed}, done + (1.0 - done) / 3

    @property
    def tile_grads(self) -> int:
        """Of an MLP in tiles: sums of gradients in float32, and the first gradient of a tile; when the others come, the
        tile's rows have gone."""
        products = 3 if self.model.gated else 2
        return self._tiled * self.model.mlp.trained * (WIDE * products + self.itemsize) // products

    @property
    def _mlp_backward(self) -> int:
        """Backward of the product of two: both factors and the input of one, its gradient and theirs."""
        rows = (6 - self.fused if self.model.gated else 4) * self.itemsize * self._tile * self.model.inner
        return rows + self._tiled * (self.stream + self._tile * self.model.hidden * self.itemsize)

    # Parts.

    @property
    def _tile(self) -> int:
        """Tokens of a tile of the MLP."""
        return min(self.tokens, self.memory.mlp_tile or self.tokens)

    @property
    def _tiled(self) -> bool:
        return self._tile < self.tokens

    @property
    def _queries(self) -> int:
        return self.tokens * self.model.query_width * self.itemsize

    @property
    def _keys(self) -> int:
        return self.tokens * self.model.key_width * self.itemsize

    @property
    def _qkv(self) -> int:
        return self._queries + 2 * self._keys

    @property
    def _out(self) -> int:
        return self._queries

    @property
    def _lse(self) -> int:
        return self.tokens * self.model.query_heads * WIDE

    @property
    def _attended(self) -> int:
        """What attention's backward pass needs of its forward pass, beside what the layer has kept of it."""
        result = self._out + self._lse + self.attention.keys
        return self._qkv + (0 if self.memory.keep in ("attention", "selective") else result)

    @property
    def _norm_forward(self) -> int:
        """What a norm holds beside its input: two tensors in float32, or its result alone."""
        return self.stream if self.fused else 2 * WIDE * self.tokens * self.model.hidden

    @property
    def norm_backward(self) -> int:
        """Three gradients, a factor and a product in float32; in one kernel two gradients as they are."""
        return 2 * self.stream if self.fused else 5 * WIDE * self.tokens * self.model.hidden

    @property
    def _norm_copy(self) -> int:
        """The input of a norm, which its gradient needs: in float32, unless one kernel reads it as it is."""
        return self.stream if self.fused else self.tokens * self.model.hidden * WIDE

    @property
    def _norm_saved(self) -> int:
        """That, what is multiplied by the weight (in one kernel it is not kept), and the result."""
        return self._norm_copy + (1 if self.fused else 2) * self.stream

    @property
    def _first_norms(self) -> int:
        """Of the first norm, and of those of heads. A float32 copy of what is float32 is the layer's input itself."""
        heads = self.model.query_width + self.model.key_width if self.model.head_norms else 0
        own = self.tokens * heads * ((0 if self.fused else WIDE) + self.itemsize)
        kept = (self.itemsize == WIDE or self.fused) and self.memory.keep != "all"
        return self._norm_saved - kept * self._norm_copy + own

    @property
    def _saved_before_mlp(self) -> dict[str, int]:
        again = self._out if self.attention.exchanged else 0  # the product after attention keeps the local one
        return {NORMS: self._first_norms + self._norm_saved, ATTENTION: self._attended + again}

    @property
    def _mlp_saved(self) -> int:
        """Both products, the activation and the product of both; in tiles nothing but the norm's result."""
        rows = 4 - self.fused if self.model.gated else 2
        return 0 if self._tiled else rows * self.itemsize * self.tokens * self.model.inner


@dataclass(frozen=True)
class Layers:
    """All layers one after another: what they keep, and where."""

    layer: Layer

    @property
    def count(self) -> int:
        return len(self.layer.model.layers)

    @property
    def away(self) -> int:
        """Layers, from the first one, whose share is on the host."""
        return min(self.layer.memory.host_layers, self.count)

    @property
    def host_bytes(self) -> int:
        """Pinned memory for what they keep, each tensor from where the stack of it aligns."""
        return sum(
            -(-size // ALIGNMENT) * ALIGNMENT
            for number in range(self.away)
            for size in self._tensors(number)
            if size >= LEAST
        )

    def kept(self, first: int) -> int:
        """Bytes on the device of what the first layers keep."""
        return self._kept[first]

    @cached_property
    def _kept(self) -> list[int]:
        sizes = (
            sum(size for size in self._tensors(number) if number >= self.away or size < LEAST)
            for number in range(self.count)
        )
        return [0, *accumulate(sizes)]

    def in_flight(self, number: int) -> int:
        """Bytes on the device of what came back from the host while a layer goes backward: its own, what its chain
        begins with, and what the nearest layer before it that keeps anything does."""
        if number >= self.away:
            return self._before(number) if 0 < number == self.away else 0
        begin = number - number % self.layer.memory.every
        own = self._large(number)
        own += sum(self._tensors(begin)[:1]) if begin < number else 0
        # In a chain that keeps one input alone the next to come is that of the chain before.
        return own + self._before(number if self._large(number) else begin)

    def _before(self, number: int) -> int:
        """Of the nearest layer before one that keeps any."""
        return next((size for one in range(number - 1, -1, -1) if (size := self._large(one))), 0)

    def _large(self, number: int) -> int:
        """Bytes of what a layer keeps and may send away."""
        return sum(size for size in self._tensors(number) if size >= LEAST)

    def leaving(self, number: int, attended: bool) -> int:
        """Bytes of the last tensors on their way to the host while a layer is computed forward, without its own input
        and the model's. Nobody frees those of the last layer that goes there before the backward pass.

        Arguments:
            attended: the layer's attention is over.
        """
        sent = [
            (layer, place, size)
            for layer in range(max(0, min(number, self.away - 1) - IN_FLIGHT), min(number + 1, self.away))
            for place, size in enumerate(self._tensors(layer))
            if size >= LEAST and (attended or layer < number or not place)
        ]
        return sum(
            size
            for layer, place, size in sent[len(sent) - min(IN_FLIGHT, len(sent)) :]
            if place or layer not in (0, number)
        )

    def between(self, number: int) -> int:
        """Inputs of the layers of a chain that were computed again, and are there while a layer goes backward."""
        every = self.layer.memory.every
        return (number % every) * self.layer.stream

    def _tensors(self, number: int) -> tuple[int, ...]:
        every = self.layer.memory.every
        return self.layer.tensors if number % every == 0 else self.layer.tensors[1:]


def _plus(a: Items, b: Items) -> dict[str, int]:
    return {name: a.get(name, 0) + b.get(name, 0) for name in {**a, **b}}
