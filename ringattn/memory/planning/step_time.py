"""How long a step takes, by item: from the prices of attention, and from operations and bytes of all the rest."""

from dataclasses import dataclass

from ringattn.memory.offload import LEAST
from ringattn.memory.planning.alive import Alive
from ringattn.memory.planning.rates import Rates
from ringattn.memory.planning.shapes import ITEMSIZE
from ringattn.parallel.machine.machine import Machine

# Elements of a token that are read and written for each one of a width, kernel by kernel as transformers' layers do it:
# two norms (their float32 copies as two elements) and two sums; rotary embeddings; the activation and its product.
HIDDEN_PASSES, HEAD_PASSES, INNER_PASSES = 38, 9, 5
FUSED_PASSES = 10, 2, 3  # of the same, where each is one kernel
NORM, FUSED_NORM, COPY = 16, 2, 2  # of these a single norm, and a copy
ROUTED_PASSES = 8  # of a token's copy for an expert: in, out by its weight, and in order again
# Of a part that carries a state: its convolution with SiLU, and norm and gate after it. Counted, never timed.
CHANNEL_PASSES, GATE_PASSES = 12, 24
BACKWARD = 2.0  # elementwise work backward, in that of a forward pass
LOGIT_BYTES = 40  # a logit: written, softmax read and written, exponentials, slope, cast


@dataclass(frozen=True)
class StepTime:
    """Predicted seconds of a step, by item, and what comes of them.

    Arguments:
        items: seconds by what they are spent on; all are exposed.
        tokens: of all ranks in a step.
        flops: of the model, without what is computed again.
        peak: FLOP/s of a rank.
    """

    items: dict[str, float]
    tokens: int
    ranks: int
    flops: float
    peak: float

    @property
    def seconds(self) -> float:
        return sum(self.items.values())

    @property
    def tokens_per_second(self) -> float:
        """Of each rank."""
        return self.tokens / self.seconds / self.ranks

    @property
    def mfu(self) -> float:
        """Share of the peak, recomputation not counted."""
        return self.flops / self.seconds / self.ranks / self.peak


def step_time(alive: Alive, machine: Machine) -> StepTime:
    """The time of the slowest rank."""
    model, run, rates = alive.model, alive.run, Rates.of(machine)
    work = _Work(alive, machine, rates)
    items = {
        "attention": run.micro_steps * (alive.attention.forward_seconds + alive.attention.backward_seconds),
        "recurrences": run.micro_steps * work.recurrences,
        "matrix products": run.micro_steps * (1 + model.backward) * work.products,
        "element by element": run.micro_steps * work.elementwise,
        "computed again": run.micro_steps * work.again,
        "tiles of the MLP": run.micro_steps * work.mlp_tiles,
        "head and loss beside its products": run.micro_steps * work.head,
        "exposed gathers and reductions": run.micro_steps * work.exposed_transfers,
        "exposed offload": run.micro_steps * work.exposed_offload,
        "optimizer": work.optimizer,
    }
    pairs = sum(count * sum(mask.band.area(0, one, one) for one in run.documents) for mask, count in model.masks)
    tokens = run.tokens * run.data * run.micro_steps
    head = model.vocabulary * model.hidden
    flops = 2.0 * (1 + model.backward) * (model.active * len(model.layers) + head) * tokens
    flops += 6.0 * (model.query_width + model.out_width) * pairs * run.data * run.micro_steps
    if model.recurrent is not None and model.recurrent.rule is not None:
        flops += 3.0 * model.recurrent.rule.flops * sum(parts.recurrence for parts in model.parts) * tokens
    return StepTime({k: v for k, v in items.items() if v > 0}, tokens, run.ranks, flops, rates.peak)


@dataclass(frozen=True)
class _Work:
    """Seconds of one micro-step's parts on the rank with the most tokens."""

    alive: Alive
    machine: Machine
    rates: Rates

    @property
    def _tokens(self) -> int:
        return self.alive.run.local_tokens

    @property
    def _layers(self) -> int:
        return len(self.alive.model.layers)

    @property
    def _layer_products(self) -> float:
        """One layer forward."""
        return self.rates.products(2.0 * self.alive.model.active * self._tokens)

    @property
    def products(self) -> float:
        """All products forward, those of the head too."""
        head = self.rates.products(2.0 * self.alive.model.vocabulary * self.alive.model.hidden * self._tokens)
        return self._layers * self._layer_products + head

    @property
    def _recurrent(self) -> tuple[float, float]:
        """Seconds of all recurrences, forward and backward."""
        use = self.alive.recurrent
        return (0.0, 0.0) if use is None else (use.forward_seconds, use.backward_seconds)

    @property
    def recurrences(self) -> float:
        return sum(self._recurrent)

    @property
    def _layer_elements(self) -> float:
        """What is not a product in one layer forward, on the mean over layers."""
        m = self.alive.model
        hidden, heads, inner = FUSED_PASSES if self.alive.run.fused else (HIDDEN_PASSES, HEAD_PASSES, INNER_PASSES)
        attending = sum(parts.attention for parts in m.parts) / self._layers
        recurrent = sum(parts.recurrence for parts in m.parts) / self._layers
        halves = (sum(parts.mixes for parts in m.parts) + len(m.mlps)) / 2 / self._layers  # each with a norm and a sum
        width = hidden * halves * m.hidden + attending * self._head_elements(heads)
        rows = sum(mlp.inner / (1 if mlp.gated else 2) for mlp in m.mlps)
        width += (inner * rows + ROUTED_PASSES * m.hidden * sum(mlp.routed for mlp in m.mlps)) / self._layers
        if m.recurrent is not None:
            width += recurrent * (CHANNEL_PASSES * m.recurrent.channels + GATE_PASSES * m.recurrent.width)
        return self._tokens * width * self.alive.run.itemsize / self.rates.memory

    def _head_elements(self, turning: int) -> float:
        """The same before one layer's attention: of what is turned, and of latents' norms and of heads that are put
        together and copied.

        Arguments:
            turning: passes over what is turned.
        """
        m, latents = self.alive.model, self.alive.model.latents
        if latents is None:
            return turning * (m.query_width + m.key_width)
        turned = latents.turned * (turning * (m.query_heads + 1) * latents.rotary + COPY * 2 * m.query_width)
        norms = FUSED_NORM if self.alive.run.fused else NORM
        return turned + COPY * (2 * m.key_width + m.value_width) + norms * (latents.queries + latents.keys)

    @property
    def elementwise(self) -> float:
        return self._layers * self._layer_elements * (1 + BACKWARD)

    @property
    def again(self) -> float:
        """What the backward pass computes again: the layer without the product that ends it, and perhaps attention."""
        memory, mlps = self.alive.memory, self.alive.model.mlps
        own = self._share(sum(mlp.weights.count for mlp in mlps))
        last = self._share(sum(mlp.weights.count / mlp.products for mlp in mlps))
        if memory.keep == "all":
            tiled = memory.mlp_tile is not None and memory.mlp_tile < self._tokens
            return tiled * self._layers * self._layer_products * (own - last)
        products = 1.0 - last
        if memory.keep == "selective":
            products = own - last
        attended = self.alive.attention.forward_seconds if memory.keep == "layer" else 0.0
        recurred = self._recurrent[0]  # which nothing but keep="all" keeps
        chained = (1 - 1 / memory.every) * self._layers * (self._layer_products + self._layer_elements)
        if memory.keep == "layer":
            chained += (1 - 1 / memory.every) * self.alive.attention.forward_seconds
        chained += (1 - 1 / memory.every) * recurred
        attended += recurred
        return self._layers * (products * self._layer_products + self._layer_elements) + attended + chained

    def _share(self, parameters: float) -> float:
        """Of all layers' products, by parameters."""
        return parameters / sum(layer.count for layer in self.alive.model.layers)

    @property
    def mlp_tiles(self) -> float:
        """Sums of an MLP's gradients over its tiles: each is read, and the sum read and written in float32."""
        tile, size = self.alive.memory.mlp_tile, self.alive.run.itemsize
        if tile is None or tile >= self._tokens:
            return 0.0
        tiles = -(-self._tokens // tile)
        trained = sum(mlp.weights.trained for mlp in self.alive.model.mlps)
        return tiles * trained * (size + 2 * 4) / self.rates.memory

    @property
    def head(self) -> float:
        """Passes over logits, and in tiles those over the head's gradient."""
        model, tile = self.alive.model, self.alive.memory.loss_tile
        logits = LOGIT_BYTES * self._tokens * model.vocabulary
        tiles = 0 if tile is None else -(-self._tokens // tile)
        trained = (model.embedding if model.tied else model.head).trained
        return (logits + tiles * 2 * 4 * trained) / self.rates.memory

    @property
    def _layer_seconds(self) -> tuple[float, float]:
        """One layer forward, and backward with what it computes again."""
        attention, recurrent = self.alive.attention, self._recurrent
        mixing = (attention.forward_seconds + recurrent[0], attention.backward_seconds + recurrent[1])
        forward = self._layer_products + self._layer_elements + mixing[0] / self._layers
        backward = self.alive.model.backward * self._layer_products + BACKWARD * self._layer_elements
        return forward, backward + (mixing[1] + self.again) / self._layers

    @property
    def exposed_transfers(self) -> float:
        """What no kernel hides of gathers (forward and backward) and reductions, and what kernels lose by the rest.

        That is the first gather and the last reduction, and of the others what takes longer than the layer beside which
        they travel.
        """
        run, model, states = self.alive.run, self.alive.model, self.alive.states
        if run.ranks == 1:
            return 0.0
        crossing = run.ranks > self.machine.gpus_per_node
        link = self.machine.links["network" if crossing else "node", "all_to_all"]
        share = (run.ranks - 1) / run.ranks
        wide = ITEMSIZE[states.reduce]

        def seconds(count: float, itemsize: int) -> float:
            return link.latency + count * itemsize * share / link.bandwidth if count else 0.0

        layer = model.largest_layer
        gather, reduce = seconds(layer.count, run.itemsize), seconds(layer.trained, wide)
        ends = seconds(model.embedding.count, run.itemsize) + seconds(model.embedding.trained, wide)
        ahead = bool(states.prefetch)
        forward, backward = self._layer_seconds
        exposed = max(0.0, gather - forward * ahead) + max(0.0, states.reshard * gather * ahead + reduce - backward)
        exposed += states.reshard * gather * (not ahead)
        moved = self._layers * (layer.count * run.itemsize * (1 + states.reshard) + layer.trained * wide) * share
        hidden = max(0.0, 1 - exposed * self._layers / max(1e-12, self._layers * (2 * gather + reduce)))
        # No kernel loses more than it would by waiting.
        lost = min(link.disturbance, 1 / link.bandwidth)
        return ends + self._layers * exposed + moved * lost * hidden

    @property
    def exposed_offload(self) -> float:
        """What takes longer to move than the layer beside which it moves, out and back."""
        layers = self.alive.layers
        if not layers.away:
            return self._exposed_states
        size = sum(one for layer in layers.layers for one in layer.tensors if one >= LEAST) / layers.count
        seconds = size / self.rates.host_link
        forward, backward = self._layer_seconds
        waits = max(0.0, seconds - forward) + max(0.0, seconds - backward)
        return layers.away * waits + self._exposed_states

    @property
    def _exposed_states(self) -> float:
        """Shards that come from the host for each gather, and gradients that go there."""
        alive = self.alive
        if alive.states.states_on == "device":
            return 0.0
        layer, ranks = alive.model.largest_layer, alive.run.ranks
        held = ITEMSIZE[alive.states.weights]
        forward, backward = self._layer_seconds
        there = layer.count * held / ranks / self.rates.host_link
        back = layer.trained * held / ranks / self.rates.host_link
        return self._layers * (max(0.0, there - forward) + max(0.0, max(there, back) - backward)) + there + back

    @property
    def optimizer(self) -> float:
        """The step: states are read and written where they are. Ranks of one host share its memory."""
        size = self.alive.held.step_bytes
        if self.alive.states.states_on == "device":
            return size / self.rates.memory
        here = min(self.alive.run.ranks, self.machine.gpus_per_node)
        return size * here / self.rates.host_memory
