"""What one layer keeps, and what is alive while it is computed, forward and backward.

Counted are the tensors that PyTorch holds for the layers of transformers: norms that are computed in float32, rotary
embeddings by halves, an MLP of three products. Bytes are of one rank.

Legend: t local tokens, E hidden size, A and K elements of a token's queries and keys, F inner rows of the MLP, b bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from ringattn.memory.planning.attention import AttentionUse
from ringattn.memory.planning.head_use import HeadUse
from ringattn.memory.planning.items import ATTENTION, MLP, NORMS, RECURRENCE, STREAM, Items
from ringattn.memory.planning.latents import LatentUse
from ringattn.memory.planning.mlp import MlpUse
from ringattn.memory.planning.norms import NormUse
from ringattn.memory.planning.parts import Parts, Weights
from ringattn.memory.planning.recurrent import RecurrentUse
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

    @cached_property
    def mlp(self) -> MlpUse | None:
        """Its MLP, if it has one."""
        part, hidden = self.parts.mlp, self.model.hidden
        if part is None:
            return None
        return MlpUse(part, hidden, self.tokens, self.itemsize, self.memory, self.fused)

    @cached_property
    def norm(self) -> NormUse:
        """One of its norms."""
        kernel = self.fused or self.model.norms.kernel
        return NormUse(self.model, self.tokens, self.itemsize, kernel)

    @property
    def heads(self) -> HeadUse:
        """Of its attention, where these are not made of latents."""
        return HeadUse(self.model, self.tokens, self.itemsize, self.memory, self.fused)

    @cached_property
    def latents(self) -> LatentUse | None:
        """Of its attention, if its queries and keys are made of such."""
        part, normed = self.model.latents, self._products_are_normed
        if part is None or not self.parts.attention:
            return None
        return LatentUse(self.model, part, self.tokens, self.itemsize, self.fused, normed)

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
        if self.latents is not None:
            kept += [self.latents.narrow]
        elif self.parts.attention:
            kept += [self.heads.narrow]
        after = self.parts.attention + self.parts.recurrence
        return kept if self.mlp is None else [*kept, *[self.stream] * after, self.mlp.narrow]

    @property
    def saved(self) -> int:
        """What autograd keeps of a layer that is computed with gradients, beside its input where that is kept."""
        before = sum(self._saved_before_mlp.values())
        return before if self.mlp is None else before + self.mlp.saved + self.norm.after

    # Forward.

    def forward(self) -> Iterator[tuple[str, Items, bool]]:
        """Moments of the forward pass, beside the layer's input; with each, whether what the layer keeps is there then.
        With keep="all" that grows from moment to moment, and is part of these."""
        n = self.stream
        grows = self.memory.keep == "all"
        yield "norm", {NORMS: self.norm.forward}, not self.parts.mixes
        result = n * self.model.norms_before
        normed = {NORMS: (self._first_norms - n) * grows, STREAM: result}
        before = normed
        if self.recurrent is not None:
            there = {RECURRENCE: max(self.recurrent.forward, self.recurrent.saved * grows)}
            yield "recurrence", _plus(normed, there), False
            yield "product after the recurrence", _plus(normed, {STREAM: n, RECURRENCE: there[RECURRENCE]}), False
            # Beside attention its result waits for the sum.
            before = _plus(normed, {STREAM: n, RECURRENCE: self.recurrent.saved * grows})
        if self.parts.attention:
            yield from self._attention_forward(before)
        if self.mlp is None:
            return
        if self.parts.mixes and not self.parts.together:
            attended = {name: size * grows for name, size in self._mixed.items()}
            attended[NORMS] = self._first_norms * grows
            yield "norm before the MLP", _plus(attended, {STREAM: n, NORMS: self.norm.forward}), True
        if not grows:
            yield "MLP", {STREAM: (1 + self.parts.mixes) * n, MLP: self.mlp.forward}, True
            if self.model.norms_after:
                yield "norm after the MLP", {STREAM: (1 + self.parts.mixes) * n, NORMS: self.norm.forward}, True
            if self.parts.together:  # the norm's result, those of both, and two sums
                yield "sum after the MLP", {STREAM: 5 * n}, True
            return
        # What the norm has kept of it is its input itself. Beside attention its result waits for the sum.
        copies = n if self.parts.together or not self.norm.keeps_input else 0
        yield "MLP", _plus(self._saved_before_mlp, {STREAM: copies, MLP: self.mlp.forward}), True
        after = _plus(
            self._saved_before_mlp,
            {STREAM: copies + (2 + self.parts.together) * n, MLP: self.mlp.saved, NORMS: self.norm.after},
        )
        yield "sum after the MLP", after, True

    def _attention_forward(self, before: Items) -> Iterator[tuple[str, Items, bool]]:
        """Moments of attention, beside what is there before it."""
        if self.latents is not None:
            yield from self._latent_attention_forward(before, self.latents)
            return
        if normed := self.heads.normed:
            alone = {} if self.recurrent is None else before
            yield "norm of queries", _plus(alone, {STREAM: self.stream, ATTENTION: normed}), False
        yield "rotary embedding", _plus(before, {ATTENTION: self.heads.turned}), False
        result = self._out + self._lse
        there = self.heads.attended + result + self.attention.forward
        yield "attention", _plus(before, {ATTENTION: there}), False
        left = {STREAM: self.stream, ATTENTION: self.heads.left + result}
        yield "product after attention", _plus(before, left), False

    def _latent_attention_forward(self, before: Items, latents: LatentUse) -> Iterator[tuple[str, Items, bool]]:
        """The same where keys are latent: what queries, keys and values are made of stands until attention is over."""
        grows = self.memory.keep == "all"
        made = latents.joined + (latents.saved if grows else latents.held)
        held = made + self._qkv + self._out + self._lse
        yield "attention", _plus(before, {ATTENTION: held + self.attention.forward}), False
        held = made + self._out + grows * (self._qkv + self._lse)
        yield "product after attention", _plus(before, {STREAM: self.stream, ATTENTION: held}), False

    # Backward.

    def backward(self) -> Iterator[tuple[str, Items, float]]:
        """Moments of the backward pass, beside the layer's input and the gradient of its output; with each the share of
        the layer's weights whose gradients are there."""
        m, before, done = self.model, self._saved_before_mlp, 0.0
        if self.mlp is not None:
            done = min(1.0, self.mlp.part.weights.count / self.weights.count)
            if m.norms_after:
                after = {MLP: self.mlp.saved, NORMS: self.norm.after + self.norm.backward}
                yield "norm after the MLP", _plus(before, after), 0.0
            yield "MLP", _plus(before, {MLP: self.mlp.backward}), done * self.mlp.last_share
            if not self.parts.together:
                copied = self.norm.copy * m.norms_before
                kept = self._first_norms + (copied + self.norm.after) * self.parts.mixes
                attended = {**self._mixed, NORMS: kept}
                yield "norm before the MLP", _plus(attended, {NORMS: self.norm.backward}), done
        first = {NORMS: self._first_norms}
        if self.parts.attention:
            computed = self._attended + self._out + self._gate_saved + self.attention.backward
            # The gradient that the MLP gave to their common input waits.
            beside = {STREAM: self.stream} if self.parts.together else {}
            if self.recurrent is not None:
                beside = {STREAM: self.stream, RECURRENCE: self.recurrent.saved}
            yield "attention", _plus({**first, ATTENTION: computed}, beside), done + (1.0 - done) / 3
            if self.latents is None and (way := self.heads.backward):
                yield "queries and keys", _plus({**first, ATTENTION: way}, beside), done + (1.0 - done) / 3
            if self.latents is not None and self.memory.keep != "all":
                again = self._attended + self.latents.joined + (self.memory.keep == "layer") * self.attention.forward
                yield "attention computed again", _plus({**first, ATTENTION: again}, beside), 0.0
        if self.recurrent is not None:
            # Beside attention the gradient of their common input waits.
            beside = {STREAM: self.stream, RECURRENCE: self.recurrent.backward}
            there = beside if self.parts.attention else {RECURRENCE: self.recurrent.backward}
            yield "recurrence", {**first, **there}, done + (1.0 - done) / 3

    # Parts.

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
        made_of = 0 if self.latents is None else self.latents.saved
        return self._qkv + made_of + (0 if kept else result)

    @property
    def _products_are_normed(self) -> bool:
        """The inputs of norms of heads or latents are products that are kept anyhow, and no copies in float32."""
        return self.memory.keep == "selective" and (self.fused or self.itemsize == WIDE)

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
    def _first_norms(self) -> int:
        """Of the first norm, and of those of heads. A float32 copy of what is float32 is the layer's input itself."""
        own = self.heads.saved if self.parts.attention and self.latents is None else 0
        if not self.model.norms_before:
            return own + (self.memory.keep == "all") * self.stream
        kept = self.norm.keeps_input and self.memory.keep != "all"
        return self.norm.saved - kept * self.norm.copy + own

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
        both = self.parts.mixes and self.mlp is not None and not self.parts.together
        return {NORMS: self._first_norms + both * (self.norm.saved + self.norm.after), **self._mixed}


def _plus(a: Items, b: Items) -> dict[str, int]:
    return {name: a.get(name, 0) + b.get(name, 0) for name in {**a, **b}}
