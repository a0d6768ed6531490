"""All that is alive on a rank, at each moment of a step that can be the peak.

The forward pass is at its fullest in the last layer and in the loss; the backward pass in the layer with which it
begins, or where layers on the host end, or in the first one, whose gradients come last; then comes the optimizer's
step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from ringattn.memory.planning.attention import AttentionUse
from ringattn.memory.planning.head import Head
from ringattn.memory.planning.items import (
    BACKWARD,
    FORWARD,
    GATHERED,
    GRADIENTS,
    HEAD,
    INPUTS,
    KEPT,
    MOVING,
    NORMS,
    PHASES,
    REDUCING,
    ROUTERS,
    STREAM,
    UPDATE,
    WORKSPACE,
    Items,
    Moment,
    largest,
    together,
)
from ringattn.memory.planning.layer import Layer
from ringattn.memory.planning.layers import Layers
from ringattn.memory.planning.parts import Weights
from ringattn.memory.planning.recurrent import RecurrentUse
from ringattn.memory.planning.shapes import ModelShape, RunShape
from ringattn.memory.planning.states import States
from ringattn.memory.settings import MemorySettings, StateSettings

INDEX = 8  # bytes of a token's number, position and target
LIBRARIES = 2 * 32 << 20  # cuBLAS and cuBLASLt on one stream of a Hopper GPU
NONE = Weights(0, 0, 0)


@dataclass(frozen=True)
class Alive:
    """What is alive on the rank with the most tokens.

    Arguments:
        tokens: of that rank.
        attention: of one layer, for this model and run.
        libraries: bytes of workspaces in torch's allocator.
        recurrent: of one layer's part that carries a state, where there is such.
    """

    model: ModelShape
    run: RunShape
    memory: MemorySettings
    states: StateSettings
    attention: AttentionUse
    libraries: int = LIBRARIES
    recurrent: RecurrentUse | None = None

    @cached_property
    def moments(self) -> tuple[Moment, ...]:
        """Each with all that is alive then."""
        return (*self._forward(), *self._backward(), *self._update())

    def peak(self, phase: str | None = None) -> Moment:
        """The fullest moment, of all or of one phase."""
        return largest(moment for moment in self.moments if phase in (None, moment.phase))

    @property
    def peaks(self) -> dict[str, Moment]:
        """The fullest moment of each phase."""
        return {phase: self.peak(phase) for phase in PHASES}

    @property
    def host(self) -> dict[str, int]:
        """Bytes of this rank on the host: states, and what layers keep there."""
        return together(self.held.host, {KEPT: self.layers.host_bytes})

    @property
    def outside(self) -> int:
        """Bytes on the device that are not of torch's allocator: message buffers of copy engines."""
        return self.attention.messages

    @cached_property
    def held(self) -> States:
        """The states."""
        return States(self.model, self.run, self.states)

    @cached_property
    def layers(self) -> Layers:
        """The layers; those that are alike are one record."""
        run, model = self.run, self.model
        shared = run.local_tokens, run.itemsize, self.memory, self.attention, run.fused
        kinds = list(zip(model.layers, model.parts, strict=True))
        made = {
            (weights, parts): Layer(model, weights, parts, *shared, self.recurrent if parts.recurrence else None)
            for weights, parts in dict.fromkeys(kinds)
        }
        return Layers(tuple(made[kind] for kind in kinds))

    @cached_property
    def head(self) -> Head:
        """The head."""
        return Head(self.model, self.run.local_tokens, self.run.itemsize, self.memory.loss_tile)

    # Phases.

    def _forward(self) -> Iterator[Moment]:
        before = {GRADIENTS: self.held.device_gradients(self.model.total) if self.run.micro_steps > 1 else 0}
        ahead = self._ahead(self.model.head)
        for number in sorted({*self.layers.ends, max(0, self.layers.away - 1), self.layers.count - 1}):
            last = number == self.layers.count - 1
            gathered = self._gathered(self.model.layers[number], ahead if last else self._next(number, 1), False)
            for name, items, attended in self.layers[number].forward():
                there = together(before, gathered, self._held(number, attended))
                moving = {MOVING: self.layers.leaving(number, attended)}
                yield self._moment(FORWARD, f"{name}, layer {number}", items, there, moving)
        there = together(before, self._kept(self.layers.count), self._gathered(self.model.head, NONE, False))
        moving = {MOVING: self.layers.leaving(self.layers.count, True), STREAM: self.layers.stream}
        for name, items in self.head.forward():
            yield self._moment(FORWARD, name, items, there, self._final_norm, moving)
        # What transformers makes of them for a rank's own loss of its routers, which goes for that of all ranks.
        if self.model.router_logits:
            made = {HEAD: self.head.left, ROUTERS: self._router_logits}
            yield self._moment(FORWARD, "loss of routers", made, there, self._final_norm, moving)

    def _held(self, number: int, attended: bool) -> dict[str, int]:
        """What layers have kept while one is computed forward, and beside it the layer's input and that of the first,
        which the model holds."""
        if attended and self.memory.keep != "all":
            inputs, kept = {0, number}, number + 1
            there = sum(not self._input_is_kept(one) for one in inputs)
        else:
            kept = number
            own = self.memory.keep != "all" or not self._input_is_kept(number)
            there = own + (number > 0 and not self._input_is_kept(0))
        return {**self._kept(kept), STREAM: self.layers.stream * there}

    def _backward(self) -> Iterator[Moment]:
        yield from self._backward_head()
        after = self.model.rest + (NONE if self.model.tied else self.model.head)
        every = self.layers.count
        second = min(self.memory.every, every - 1)  # while its chain goes backward, the input of the first comes back
        ends = {second, max(0, self.layers.away - 1), min(self.layers.away, every - 1), every - 1}
        for number in sorted({*self.layers.ends, *ends}):
            done = sum(self.model.layers[number + 1 :], after)
            following = self.model.layers[number + 1] if number + 1 < every else self.model.head
            yield from self._backward_layer(number, done, following)
        yield from self._backward_embedding()

    def _backward_head(self) -> Iterator[Moment]:
        kept, head = self._kept(self.layers.count), self.model.head
        gathered = self._gathered(head, self._next(self.layers.count, -1), True)
        own = self.head_gradient
        for name, items in self.head.backward():
            grad = {REDUCING: 0 if "logits" in name else own}
            yield self._moment(BACKWARD, name, items, kept, gathered, self._final_norm, grad)
        stream = {STREAM: self.layers.stream}
        reducing = {REDUCING: own + (0 if self.model.tied else self.held.reducing(head))}
        yield self._moment(BACKWARD, "gradients of the head are reduced", kept, reducing, self._final_norm, stream)
        wide = {NORMS: self.layers[-1].norm.backward}
        gathered = self._gathered(NONE, self._next(self.layers.count, -1), True)
        yield self._moment(
            BACKWARD, "final norm", kept, gathered, self._final_norm, wide, {REDUCING: self.held.reducing(head)}
        )

    def _backward_layer(self, number: int, done: Weights, following: Weights) -> Iterator[Moment]:
        """Moments of one layer, when those after it are done.

        Arguments:
            following: whose gradients are still being reduced.
        """
        own, layer = self.model.layers[number], self.layers[number]
        kept = self._kept(number if self.memory.keep == "all" else number + 1)
        shared = together(
            kept,
            {MOVING: self.layers.in_flight(number), GRADIENTS: self.held.device_gradients(self._all_or(done))},
            self._gathered(own, self._next(number, -1), True),
            {STREAM: layer.stream + self.layers.between(number), REDUCING: self.held.reducing(following)},
        )
        for name, items, share in layer.backward():
            grads = self.held.single(own.trained * share) + self._tied_gradient
            grads += layer.mlp.tile_grads if layer.mlp is not None and name == "MLP" else 0
            yield self._moment(BACKWARD, f"{name}, layer {number}", items, shared, {REDUCING: grads})
        reducing = {REDUCING: self.held.single(own.trained) + self.held.reducing(own) + self._tied_gradient}
        grads_here = {GRADIENTS: self.held.device_gradients(self._all_or(done + own)), STREAM: layer.stream}
        ahead = self._gathered(NONE, self._next(number, -1), True)
        yield self._moment(
            BACKWARD, f"gradients of layer {number} are reduced", self._kept(number), reducing, grads_here, ahead
        )

    def _backward_embedding(self) -> Iterator[Moment]:
        embedding = self.model.embedding
        grads = self.held.device_gradients(self.model.total)
        single = self.held.single(embedding.trained)
        items = {STREAM: self.layers.stream, GRADIENTS: grads, REDUCING: single + self.held.reducing(embedding)}
        yield self._moment(BACKWARD, "embedding", items, {REDUCING: self._tied_gradient})

    def _update(self) -> Iterator[Moment]:
        grads = {GRADIENTS: self.held.device_gradients(self.model.total)}
        yield self._moment(UPDATE, "optimizer's step", grads, self.held.update)

    # Parts.

    def _moment(self, phase: str, name: str, *parts: Items) -> Moment:
        routers = {ROUTERS: 0 if phase == UPDATE else self._router_logits}
        return Moment(phase, name, together(self._always, routers, *parts))

    @property
    def _router_logits(self) -> int:
        """Where their loss counts: they stay from a layer's forward pass until its backward pass, as gradients then."""
        return self.run.local_tokens * self.model.router_logits * self.run.itemsize

    @cached_property
    def _always(self) -> dict[str, int]:
        """States, inputs, rotary tables, workspaces."""
        latents = self.model.latents
        rotary = 2 * (self.model.head_dim if latents is None else latents.rotary) * self.run.itemsize
        inputs = {INPUTS: self.run.local_tokens * (3 * INDEX + rotary), WORKSPACE: self.libraries}
        root = self.model.rest.count + (self.model.embedding.count if self.model.tied else 0)
        gathered = 0 if self.run.engine == "deepspeed" else root * self.run.itemsize
        return together(self.held.device, inputs, {GATHERED: gathered})

    def _kept(self, first: int) -> dict[str, int]:
        return {KEPT: self.layers.kept(first)}

    def _input_is_kept(self, number: int) -> bool:
        if self.memory.keep == "all":  # autograd may keep copies
            return self.layers[number].norm.keeps_input or not self.model.norms_before
        return number >= self.layers.away and number % self.memory.every == 0

    @property
    def _final_norm(self) -> dict[str, int]:
        """What the norm before the head keeps: its input in float32, that by its deviation; in one kernel its input."""
        return {NORMS: self.layers[-1].norm.kept}

    def _gathered(self, group: Weights, ahead: Weights, backward: bool) -> dict[str, int]:
        whole = 0
        if not self.states.reshard and self.run.engine == "fsdp2":
            # All layers stay until their backward pass.
            whole = sum(layer.count for layer in self.model.layers) * self.run.itemsize
            group, ahead = (NONE, NONE) if group in self.model.layers else (group, NONE)
        return {GATHERED: whole + self.held.gathered(group, ahead, backward)}

    def _next(self, number: int, way: int) -> Weights:
        """Layers whose weights are gathered ahead while one is computed, on the way forward or backward."""
        places = range(number + way, number + way * (1 + self.states.prefetch), way)
        return sum((self.model.layers[place] for place in places if 0 <= place < self.layers.count), NONE)

    def _ahead(self, head: Weights) -> Weights:
        return head if self.states.prefetch else NONE

    def _all_or(self, done: Weights) -> Weights:
        """Gradients of earlier micro-steps are of all weights."""
        return self.model.total if self.run.micro_steps > 1 else done

    @property
    def head_gradient(self) -> int:
        """The gradient of the head's weights before it is reduced."""
        weights = self.model.embedding if self.model.tied else self.model.head
        return self.held.single(weights.trained)

    @property
    def _tied_gradient(self) -> int:
        """A head that is the embedding has its gradient until the embedding's is there."""
        return self.head_gradient if self.model.tied else 0
