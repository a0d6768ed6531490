"""What lives between steps, what is gathered of it, and how gradients go back into it, by engine.

FSDP2 is counted tensor by tensor (torch 2.11 to 2.13, groups of `ringattn.training.engines`), DeepSpeed by its
documented buffers, which is less exact.
"""

import math
from dataclasses import dataclass

from ringattn.memory.planning.items import GRADIENTS, MOMENTS, STEP, WEIGHTS, Items
from ringattn.memory.planning.parts import Weights
from ringattn.memory.planning.shapes import ITEMSIZE, ModelShape, RunShape
from ringattn.memory.settings import StateSettings

WIDE = 4
BLOCK = 256  # moments of 8 bits that share a float32 scale
MOMENT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0 + 4 / BLOCK}
# Elements, of DeepSpeed's defaults: reduce_bucket_size and stage3_max_live_parameters.
BUCKET, LIVE = 5e8, 1e9


@dataclass(frozen=True)
class States:
    """The states of one rank."""

    model: ModelShape
    run: RunShape
    settings: StateSettings

    @property
    def held(self) -> float:
        """Bytes of a weight, and of a gradient, that waits."""
        return ITEMSIZE[self.settings.weights]

    @property
    def between_steps(self) -> dict[str, int]:
        """Weights and moments, wherever they are."""
        total, ranks = self.model.total, self.run.ranks
        weights = total.count * self.held / ranks
        if self.run.engine == "deepspeed":  # beside master weights those that are computed with
            weights = total.trained * WIDE / ranks + self._shard(total.count * self.run.itemsize, 3)
        return {WEIGHTS: math.ceil(weights), MOMENTS: math.ceil(self._moments / ranks)}

    @property
    def device(self) -> dict[str, int]:
        """Of that, what is on the device."""
        if self.settings.states_on == "device":
            return self.between_steps
        if self.run.engine == "deepspeed":
            return {WEIGHTS: math.ceil(self._shard(self.model.total.count * self.run.itemsize, 3))}
        return {}

    @property
    def host(self) -> dict[str, int]:
        """Bytes of a rank on the host, gradients with them, which the step reads there."""
        if self.settings.states_on == "device":
            return {}
        return {**self.between_steps, GRADIENTS: self.gradients(self.model.total)}

    def gradients(self, done: Weights) -> int:
        """Bytes of a rank's gradients once those of some weights are reduced, wherever they are."""
        if self.run.engine == "deepspeed":
            return math.ceil(self._shard(done.trained * WIDE, 2))
        return math.ceil(done.trained * self.held / self.run.ranks)

    def device_gradients(self, done: Weights) -> int:
        """Those on the device."""
        return self.gradients(done) if self.settings.states_on == "device" else 0

    # What is gathered.

    def gathered(self, group: Weights, ahead: Weights, backward: bool) -> int:
        """Bytes of a group's weights while it is computed, and of those that are gathered ahead of their use.

        A gather fills one buffer, which is copied to where the weights stand. In the forward pass it goes only when the
        next is copied, so that copy and gather do not wait for each other. One rank alone copies its weights and
        gathers nothing.
        """
        size = self.run.itemsize
        if self.run.engine == "deepspeed":
            if self.run.zero_stage < 3:
                return 0
            return int(size * min(self.model.total.count, group.count + LIVE))
        if self.run.ranks == 1:
            return group.count * size
        deferred = group.count if not backward and self.settings.prefetch else 0
        return (group.count + deferred + ahead.count) * size

    def single(self, trained: float) -> int:
        """Gradients of weights that are together, before they are reduced."""
        if self.run.engine == "deepspeed":
            return 0
        return math.ceil(trained * self.run.itemsize)

    def reducing(self, group: Weights) -> int:
        """What stands between gradients of a group and the rank's shards, until that of the next takes its place."""
        if self.run.engine == "deepspeed":
            return int(2 * min(BUCKET, self.model.total.trained) * self.run.itemsize)
        wide = ITEMSIZE[self.settings.reduce]
        rounded = self.run.ranks > 1 and (wide != self.held or self.settings.states_on == "host")
        return math.ceil(group.trained * wide * (1 + rounded / self.run.ranks))  # one rank has nothing to add up

    # The optimizer.

    @property
    def update(self) -> Items:
        """What the step needs beside states and gradients, on the device."""
        if self.settings.states_on == "host":
            return {}
        if self.run.engine == "deepspeed":
            return {STEP: math.ceil(self.model.total.trained * WIDE / self.run.ranks)}
        if self.run.matrices:
            return {STEP: self._orthogonal}
        if (self.settings.weights, self.settings.moments) == ("float32", "float32"):
            return {}  # one fused kernel
        largest = max(self.model.embedding.trained, self.model.head.trained, self.model.largest_layer.trained)
        return {STEP: math.ceil(3 * WIDE * largest / self.run.ranks)}  # one tensor at a time, in float32

    @property
    def step_bytes(self) -> float:
        """Bytes that the step of a rank reads and writes: weights, gradients and moments."""
        total, ranks = self.model.total.trained, self.run.ranks
        return (3 * total * self.held + 2 * self._moments) / ranks

    @property
    def _orthogonal(self) -> int:
        """What Muon's step has beside states (`ringattn.training.engines.muon`), in bfloat16 but for updates.

        Alone a rank has a matrix's momentum, what it becomes, and that twice in float32 as it is applied. Of several
        ranks each has its rows of as many matrices, these end to end, one matrix whole, two copies of that as it is
        multiplied, and two products of its shorter side.
        """
        rows, columns = self.run.largest_matrix
        size, half = rows * columns, ITEMSIZE["bfloat16"]
        if self.run.ranks == 1:
            return 2 * (half + WIDE) * size
        return half * (5 * size + 2 * min(rows, columns) ** 2)

    @property
    def _moments(self) -> float:
        """Bytes of both moments, of all ranks. Those of embeddings are not of 8 bits."""
        if self.run.matrices:  # float32 alone
            return WIDE * (2 * self.model.total.trained - self.run.matrices)
        own = MOMENT_BYTES[self.settings.moments]
        embedding = max(own, self.held) if self.settings.moments == "int8" else own
        return 2 * (
            (self.model.total.trained - self.model.embedding.trained) * own + self.model.embedding.trained * embedding
        )

    def _shard(self, size: float, stage: int) -> float:
        """Bytes of a rank, of what ZeRO shards from a stage on."""
        return size / self.run.ranks if self.run.zero_stage >= stage else size
