"""What is looked at before and after every step: that all ranks do the same one, and that its numbers can be used."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ringattn.parallel.mesh.mesh import SequenceMesh
from ringattn.training.checks.bad_numbers import BadSteps, finite
from ringattn.training.checks.culprit import first_culprit
from ringattn.training.checks.recomputing import FirstTime, check_same, compute_first
from ringattn.training.engines import Engine
from ringattn.training.loss import Brought
from ringattn.training.packs.batches import Batch
from ringattn.training.packs.placing import LocalPack
from ringattn.training.start.agreement import Agreement, digest_of, record_of
from ringattn.training.start.job import Job


@dataclass(frozen=True)
class Before:
    """A step that is about to be done.

    Arguments:
        step: steps that are done.
        alike: what the step is, by name; ranks of one run have the same.
        first: what it gave when it was computed once before, or None.
    """

    step: int
    alike: dict[str, Any]
    first: FirstTime | None

    @property
    def digest(self) -> int:
        """Of what the step is, 0 to below 2^62."""
        return hash(tuple(value for value in self.alike.values() if not isinstance(value, str))) % 2**62


class StepChecks:
    """Made and called by all ranks at the same places.

    Arguments:
        forward: the loss of a pack, from it and the targets of its replica in the step.
    """

    def __init__(
        self, job: Job, mesh: SequenceMesh, engine: Engine, forward: Callable[[LocalPack, int], torch.Tensor]
    ) -> None:
        run = job.cfg.run
        self._job, self._mesh, self._engine, self._forward = job, mesh, engine, forward
        self._agreement = Agreement(job.output, job.device, run.check_every)
        self._started_with = digest_of(record_of(job))
        self.bad_steps = BadSteps(job.output, run.max_bad_steps, mesh.data_rank, mesh.data)

    def before(self, step: int, learning_rate: float, batch: Batch[LocalPack]) -> Before:
        """Compares ranks when it is time, and computes a step for the first time when it is to be computed twice.

        Raises Disagreement on all ranks.
        """
        alike = {
            "steps done": step,
            "the learning rate": learning_rate,
            "the packs of the step": batch.counts.digest,
            "the configuration": self._started_with,
        }
        if self._agreement.due(step):
            self._agreement.compare(step, alike | self._engine.alike())
        every = self._job.cfg.run.recompute_every
        twice = every > 0 and (step + 1) % every == 0
        return Before(step, alike, self._computed(batch) if twice else None)

    def after(self, before: Before, done: Brought, batch: Batch[LocalPack]) -> None:
        """Looks at what a step brought.

        Raises, on all ranks alike, Disagreement, SilentFault, or BadNumbers if too many steps in a row were left out.
        """
        step = before.step + 1
        if not done.alike:
            self._agreement.explain(before.step, before.alike)
        if before.first is not None:
            check_same(self._job.output, step, before.first, done, self._job.cfg.run.deterministic)
        if finite(done):
            self.bad_steps.good()
            return
        targets = batch.targets_of(self._mesh.data_rank, self._mesh.data)
        finding = first_culprit(self._engine, lambda local: self._forward(local, targets), batch, self._job.device)
        self.bad_steps.bad(step, done, finding, batch)

    def _computed(self, batch: Batch[LocalPack]) -> FirstTime:
        job, policy = self._job, self._job.cfg.parallel.policy
        return compute_first(self._engine, self._forward, batch, self._mesh, job.corpus, policy, job.device)
