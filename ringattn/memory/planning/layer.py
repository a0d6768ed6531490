"""What one layer keeps, and what is alive while it is computed, forward and backward.

Counted are the tensors that PyTorch holds for the layers of transformers: norms that are computed in float32, rotary
embeddings by halves, an MLP of three products. Bytes are of one rank.

Legend: t local tokens, E hidden size, A and K elements of a token's queries and keys, F inner rows of the MLP, b bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from ringattn.memory.planning.attention import AttentionUse
from ringattn.memory.planning.items import ATTENTION, MLP, NORMS, RECURRENCE, STREAM, Items
from ringattn.memory.planning.recurrent import RecurrentUse
from ringattn.memory.planning.shapes import ModelShape, Parts, Weights
from ringattn.memory.settings import MemorySettings

WIDE = 4  # bytes of float32, in which norms and sums are computed


@dataclass(frozen=True)
class Layer:
    """One layer of a model on a rank.

    Arguments:
        tokens: of the rank.
        itemsize: bytes of an element of what is computed.
        fused: norms, rotary embeddings and the MLP's product are one kernel each, which keep their inputs as they are.
        recurrent: of its part that carries a state, if it has one.
    """

    model: ModelShape
    weights: Weights
    parts: Parts
    tokens: int
    itemsize: int
    memory: MemorySettings
    attention: AttentionUse
    fused: bool = False
    recurrent: RecurrentUse | None = None

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
        kept = [self.stream]
        if self.parts.attention:
            kept += [self._out, self._lse]
        if self.memory.keep == "selective":  # narrow products
            kept += self._products
        return (*kept, self.attention.keys) if self.parts.attention and self.attention.keys else tuple(kept)

    @property
    def _products(self) -> list[int]:
        """The last one of a layer is needed for nothing. In tiles none is kept."""
        kept = [] if self.recurrent is None else [self.recurrent.narrow]
        if self.parts.attention and self.model.latents is not None:
            kept += [self._bytes(self.model.latents.narrow)]
        elif self.parts.attention:
            kept += [self._queries * (1 + self.model.gated_attention), self._keys, self._values]
        after = self.parts.attention + self.parts.recurrence
        if not self.parts.mlp:
            return kept
        return [*kept, *[self.stream] * after, self._bytes(self.model.mlp_narrow) * (not self._tiled)]

    @property
    def saved(self) -> int:
        """What autograd keeps of a layer that is computed with gradients, beside its input where that is kept."""
        return sum(self._saved_before_mlp.values()) + self._mlp_saved + self.parts.mlp * self._norm_after

    # Forward.

    def forward(self) -> Iterator[tuple[str, Items, bool]]:
        """Moments of the forward pass, beside the layer's input; with each, whether what the layer keeps is there then.
        With keep="all" that grows from moment to moment, and is part of these."""
        n = self.stream
        grows = self.memory.keep == "all"
        yield "norm", {NORMS: self._norm_forward}, not self.parts.mixes
        normed = {NORMS: (self._first_norms - n) * grows, STREAM: n}
        before = normed
        if self.recurrent is not None:
            there = {RECURRENCE: max(self.recurrent.forward, self.recurrent.saved * grows)}
            yield "recurrence", _plus(normed, there), False
            yield "product after the recurrence", _plus(normed, {STREAM: n, RECURRENCE: there[RECURRENCE]}), False
            # Beside attention its result waits for the sum.
            before = _plus(normed, {STREAM: n, RECURRENCE: self.recurrent.saved * grows})
        if self.parts.attention:
            yield from self._attention_forward(before)
        if not self.parts.mlp:
            return
        if self.parts.mixes:
            attended = {name: size * grows for name, size in self._mixed.items()}
            attended[NORMS] = self._first_norms * grows
            yield "norm before the MLP", _plus(attended, {STREAM: n, NORMS: self._norm_forward}), True
        if not grows:
            yield "MLP", {STREAM: (1 + self.parts.mixes) * n, MLP: self._mlp_forward}, True
            if self.model.norms_after:
                yield "norm after the MLP", {STREAM: (1 + self.parts.mixes) * n, NORMS: self._norm_forward}, True
            return
        copies = 0 if self.itemsize == WIDE else n  # in float32 the norm has kept its input
        yield "MLP", _plus(self._saved_before_mlp, {STREAM: copies, MLP: self._mlp_forward}), True
        after = _plus(self._saved_before_mlp, {STREAM: copies + 2 * n, MLP: self._mlp_saved, NORMS: self._norm_after})
        yield "sum after the MLP", after, True

    def _attention_forward(self, before: Items) -> Iterator[tuple[str, Items, bool]]:
        """Moments of attention, beside what is there before it."""
        t, b, m = self.tokens, self.itemsize, self.model
        if m.latents is not None:
            yield from self._latent_attention_forward(before)
            return
        if m.head_norms:
            wide = 2 * (b if self.fused else WIDE)
            alone = {} if self.recurrent is None else before
            queries = {STREAM: self.stream, ATTENTION: (b + wide) * t * m.query_width + self._gate}
            yield "norm of queries", _plus(alone, queries), False
        turned = m.query_width + m.key_width if self.fused else 3 * m.query_width
        yield "rotary embedding", _plus(before, {ATTENTION: self._qkv + self._gate + b * t * turned}), False
        held = self._qkv + self._out + self._lse + self._gate
        yield "attention", _plus(before, {ATTENTION: held + self.attention.forward}), False
        gated = 2 * self._gate  # its values, and their product
        yield "product after attention", _plus(before, {STREAM: self.stream, ATTENTION: held + gated}), False

    def _latent_attention_forward(self, before: Items) -> Iterator[tuple[str, Items, bool]]:
        """The same where keys are latent: what queries, keys and values are made of stands until attention is over."""
        grows = self.memory.keep == "all"
        made = self._joined + (self._latents_saved if grows else self._latents_held)
        held = made + self._qkv + self._out + self._lse
        yield "attention", _plus(before, {ATTENTION: held + self.attention.forward}), False
        held = made + self._out + grows * (self._qkv + self._lse)
        yield "product after attention", _plus(before, {STREAM: self.stream, ATTENTION: held}), False

    @property
    def _mlp_forward(self) -> int:
        """The activation, the other product, and theirs; in tiles also the output of all and of one."""
        steps = 1 + self.model.gated + self.model.joined + self.model.mlp_steps
        rows = steps * self.itemsize * self._tile * self.model.inner
        # Of experts what goes in, what comes out, that by its weight, and back in the order of tokens.
        kept = self._mlp_saved if self.memory.keep == "all" else 2 * self._copies
        rows = max(rows + self._copies, kept + 2 * self._copies)
        return rows + self._tiled * (self.stream + self._tile * self.model.hidden * self.itemsize)

    # Backward.

    def backward(self) -> Iterator[tuple[str, Items, float]]:
        """Moments of the backward pass, beside the layer's input and the gradient of its output; with each the share of
        the layer's weights whose gradients are there."""
        m, before, done = self.model, self._saved_before_mlp, 0.0
        if self.parts.mlp:
            done = min(1.0, m.mlp.count / self.weights.count)
            share = 0.0 if self._tiled else done / (3 if m.gated else 2)
            if m.norms_after:
                after = {MLP: self._mlp_saved, NORMS: self._norm_after + self.norm_backward}
                yield "norm after the MLP", _plus(before, after), 0.0
            yield "MLP", _plus(before, {MLP: self._mlp_backward}), share
            kept = self._first_norms + (self._norm_copy + self._norm_after) * self.parts.mixes
            attended = {**self._mixed, NORMS: kept}
            yield "norm before the MLP", _plus(attended, {NORMS: self.norm_backward}), done
        first = {NORMS: self._first_norms}
        if self.parts.attention:
            computed = self._attended + self._out + self._gate_saved + self.attention.backward
            beside = {} if self.recurrent is None else {STREAM: self.stream, RECURRENCE: self.recurrent.saved}
            yield "attention", _plus({**first, ATTENTION: computed}, beside), done + (1.0 - done) / 3
            if m.latents is not None and self.memory.keep != "all":
                again = self._attended + self._joined + (self.memory.keep == "layer") * self.attention.forward
                yield "attention computed again", _plus({**first, ATTENTION: again}, beside), 0.0
        if self.recurrent is not None:
            # Beside attention the gradient of their common input waits.
            beside = {STREAM: self.stream, RECURRENCE: self.recurrent.backward}
            there = beside if self.parts.attention else {RECURRENCE: self.recurrent.backward}
            yield "recurrence", {**first, **there}, done + (1.0 - done) / 3

    @property
    def tile_grads(self) -> int:
        """Of an MLP in tiles: sums of gradients in float32, and the first gradient of a tile; when the others come, the
        tile's rows have gone."""
        products = 3 if self.model.gated else 2
        return self._tiled * self.parts.mlp * self.model.mlp.trained * (WIDE * products + self.itemsize) // products

    @property
    def _mlp_backward(self) -> int:
        """Backward of the product of two: both factors and the input of one, its gradient and theirs."""
        rows = (
            (6 - self.fused if self.model.gated else 3 + self.model.mlp_steps)
            * self.itemsize
            * self._tile
            * self.model.inner
        )
        # Of experts first the gradient of their sum, its zeros, and that in their order, beside what was kept.
        rows = max(rows + self._copies, self._kept_rows * self._tile + 5 * self._copies)
        return rows + self._tiled * (self.stream + self._tile * self.model.hidden * self.itemsize)

    # Parts.

    @property
    def _copies(self) -> int:
        """A tile's tokens, each as often as experts see it."""
        return self._tile * self.model.hidden * self.model.routed * self.itemsize

    @property
    def _kept_rows(self) -> int:
        """Bytes of a token's inner rows that autograd keeps: both products, the activation and the product of both."""
        return (4 - self.fused if self.model.gated else 2) * self.itemsize * self.model.inner

    @property
    def _tile(self) -> int:
        """Tokens of a tile of the MLP."""
        return min(self.tokens, self.memory.mlp_tile or self.tokens)

    @property
    def _tiled(self) -> bool:
        return self._tile < self.tokens

    @property
    def _queries(self) -> int:
        return self._bytes(self.model.query_width)

    @property
    def _keys(self) -> int:
        return self._bytes(self.model.key_width)

    @property
    def _values(self) -> int:
        return self._bytes(self.model.value_width)

    @property
    def _qkv(self) -> int:
        return self._queries + self._keys + self._values

    @property
    def _out(self) -> int:
        return self._bytes(self.model.out_width)

    @property
    def _lse(self) -> int:
        return self.tokens * self.model.query_heads * WIDE

    @property
    def _attended(self) -> int:
        """What attention's backward pass needs of its forward pass, beside what the layer has kept of it."""
        result = self._out + self._lse + self.attention.keys
        kept = self.memory.keep in ("attention", "selective")
        return self._qkv + self._latents_saved + (0 if kept else result)

    @property
    def _latents_saved(self) -> int:
        """What autograd keeps of latents: of each its norm's input, which in float32 is a copy, what is multiplied by
        the norm's weight, and the result. The part that is turned stands beside the latent of keys, where that is no
        copy."""
        latents = self.model.latents
        if latents is None:
            return 0
        width, b = latents.queries + latents.keys, self.itemsize
        saved = width * (2 * b if self.fused else WIDE + 2 * b)
        if self._products_are_normed:
            saved -= width * b
        elif self.fused or b == WIDE:
            saved += latents.rotary * b
        return self.tokens * saved

    @property
    def _products_are_normed(self) -> bool:
        """The inputs of norms of heads or latents are products that are kept anyhow, and no copies in float32."""
        return self.memory.keep == "selective" and (self.fused or self.itemsize == WIDE)

    @property
    def _latents_held(self) -> int:
        """The same without autograd: of keys alone, and its norm's result."""
        latents = self.model.latents
        return 0 if latents is None else self._bytes(2 * latents.keys + latents.rotary)

    @property
    def _joined(self) -> int:
        """What stands beside latents, and beside queries, keys and values as a kernel takes them, until attention is
        over: the parts of which heads are put together, and heads of which those are copies."""
        m, latents = self.model, self.model.latents
        if latents is None:
            return 0
        turned = latents.turned * (2 * m.query_width + (m.query_heads + 1) * latents.rotary)
        return self._bytes(turned + 2 * m.key_width - m.key_heads * latents.rotary + m.value_width)

    def _bytes(self, width: int) -> int:
        """Of so many elements a token."""
        return self.tokens * width * self.itemsize

    @property
    def _gate(self) -> int:
        """Of attention's output, which comes with the queries."""
        return self._out * self.model.gated_attention

    @property
    def _gate_saved(self) -> int:
        """Its values and the product; what it was computed from stands with the queries, which no norm in float32
        copies."""
        return (2 + (self.itemsize == WIDE)) * self._gate

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
        """That, what is multiplied by the weight, and the result."""
        return self._norm_copy + self._normed + self.stream

    @property
    def _normed(self) -> int:
        """What is multiplied by a norm's weight; in one kernel it is not kept."""
        wide = WIDE if self.model.wide_norms else self.itemsize
        return 0 if self.fused else self.tokens * self.model.hidden * wide

    @property
    def _norm_after(self) -> int:
        """Of a norm behind a part, whose result nothing needs, and whose input is kept for it alone."""
        return self.model.norms_after * (self._norm_copy + self._normed)

    @property
    def _first_norms(self) -> int:
        """Of the first norm, and of those of heads. A float32 copy of what is float32 is the layer's input itself."""
        asked = self.model.head_norms and self.parts.attention
        heads = self.model.query_width + self.model.key_width if asked else 0
        normed = 0 if self.fused else WIDE + (WIDE - self.itemsize) * self.model.wide_norms
        own = self._bytes(heads) * (not self._products_are_normed) + self.tokens * heads * normed
        kept = (self.itemsize == WIDE or self.fused) and self.memory.keep != "all"
        return self._norm_saved - kept * self._norm_copy + own

    @property
    def _mixed(self) -> dict[str, int]:
        """What autograd keeps of attention and of a recurrence."""
        out = {}
        if self.parts.attention:
            again = self._out if self.attention.exchanged else 0  # the product after attention keeps the local one
            out[ATTENTION] = self._attended + self._gate_saved + again
        if self.recurrent is not None:
            out[RECURRENCE] = self.recurrent.saved
        return out

    @property
    def _saved_before_mlp(self) -> dict[str, int]:
        both = self.parts.mixes and self.parts.mlp
        return {NORMS: self._first_norms + both * (self._norm_saved + self._norm_after), **self._mixed}

    @property
    def _mlp_saved(self) -> int:
        """In tiles nothing but the norm's result; of experts what goes in and comes out too."""
        return 0 if self._tiled or not self.parts.mlp else self._kept_rows * self.tokens + 2 * self._copies


def _plus(a: Items, b: Items) -> dict[str, int]:
    return {name: a.get(name, 0) + b.get(name, 0) for name in {**a, **b}}
