"""Steps whose loss or gradient is not finite: left out on all ranks alike, recorded, and not borne for ever.

Such a step counts: the learning rate and the data go on. Weights, moments and the optimizer's own count of steps stay,
so that the next step is as good as if the packs of this one had not been there.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ringattn.training.checks.culprit import Finding, documents_of
from ringattn.training.failures import FailedTogether
from ringattn.training.health.incidents import record_incident
from ringattn.training.loss import Brought
from ringattn.training.packs.batches import Batch
from ringattn.training.packs.placing import LocalPack

KIND = "bad-numbers"


class BadNumbers(FailedTogether):
    """Too many steps in a row had no finite loss and gradient. To start again alone would not help."""

    restart = False


class BadSteps:
    """Counts steps that are left out one after another.

    Arguments:
        output: the run's folder.
        most: so many in a row are borne; one more raises BadNumbers.
        data_rank, replicas: of this rank, to tell its packs from the others.
    """

    def __init__(self, output: Path, most: int, data_rank: int, replicas: int) -> None:
        self._output, self._most = output, most
        self._data_rank, self._replicas = data_rank, replicas
        self._in_a_row = 0

    @property
    def last_was_bad(self) -> bool:
        """Whether the newest step was left out."""
        return self._in_a_row > 0

    def good(self) -> None:
        """A step was taken."""
        self._in_a_row = 0

    def bad(self, step: int, done: Brought, finding: Finding | None, batch: Batch[LocalPack]) -> None:
        """A step was left out. Collective; rank 0 records it.

        Arguments:
            step: counted from 1.
            finding: what this rank found when it repeated the step.

        Raises BadNumbers on all ranks if it was one too many.
        """
        self._in_a_row += 1
        answers: list[dict[str, Any] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, self._told(finding, batch))
        findings = first_of(answers)
        message = f"step {step} is left out: loss {done.loss:g}, gradient norm {done.norm:g}; {_who(findings)}"
        if dist.get_rank() == 0:
            print(f"warning: {message}", flush=True)
            facts: dict[str, Any] = {"step": step, "in_a_row": self._in_a_row, "loss": f"{done.loss:g}"}
            facts |= {"grad_norm": f"{done.norm:g}", "found": findings}
            if not findings:
                facts["packs"] = [documents_of(plan, None) for plan in batch.plans]
            record_incident(self._output, KIND, message, findings[0]["rank"] if findings else None, **facts)
        if self._in_a_row > self._most:
            first = step - self._in_a_row + 1
            raise BadNumbers(
                f"no finite loss and gradient in steps {first} to {step}, more than run.max_bad_steps={self._most} in "
                f"a row; {_who(findings)}. Checkpoints in {self._output} are from before step {first}; look at "
                "incidents/ there, and go on with a lower optim.lr or other documents"
            )

    def _told(self, finding: Finding | None, batch: Batch[LocalPack]) -> dict[str, Any] | None:
        """A finding with the documents that it was made of."""
        if finding is None:
            return None
        plan = batch.plans[finding.micro * self._replicas + self._data_rank]
        indices = batch.micro[finding.micro].layout.indices()
        documents = documents_of(plan, indices[finding.rows].tolist() if finding.rows else None)
        where = {"rank": dist.get_rank(), "module": finding.module, "how": finding.how}
        return where | {"micro_step": finding.micro, "order": finding.order, "documents": documents}


def first_of(findings: Sequence[dict[str, Any] | None]) -> list[dict[str, Any]]:
    """Those that came first: what one rank makes spreads to the others."""
    told = [one for one in findings if one is not None]
    places = [(one["micro_step"], one["order"]) for one in told]
    return [one for one, place in zip(told, places, strict=True) if place == min(places)]


def finite(done: Brought) -> bool:
    """Whether a step was taken."""
    return math.isfinite(done.loss) and math.isfinite(done.norm)


def check_weights(model: nn.Module, step: int, device: torch.device) -> None:
    """Raises BadNumbers, on all ranks, if any weight of any rank is infinite or NaN. Collective."""
    held = [getattr(p, "ds_tensor", p) for p in model.parameters()]  # what ZeRO 3 leaves of a parameter on this rank
    local = [getattr(one, "_local_tensor", one).detach() for one in held]
    bad = torch.zeros((), device=device)
    for tensor in local:
        if tensor.is_floating_point() and tensor.numel():
            bad += (~torch.isfinite(tensor)).any().to(bad)
    dist.all_reduce(bad)
    if bool(bad):
        raise BadNumbers(
            f"the weights are not finite after step {step}: no checkpoint of them is written, and those that there are "
            "stay as they are"
        )


def _who(told: list[dict[str, Any]]) -> str:
    """Which ranks made it, and where."""
    if not told:
        return "it did not come again when the passes were repeated, as a fault of the hardware would not"
    shown = [
        f"rank {one['rank']} made it in {one['module']}, {one['how']}, {_documents(one['documents'])}" for one in told
    ]
    more = f"; and {len(shown) - 3} more ranks" if len(shown) > 3 else ""
    return "; ".join(shown[:3]) + more


def _documents(found: list[dict[str, int]]) -> str:
    names = [f"{one['document']} (tokens {one['start']} to {one['stop']})" for one in found[:3]]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"document{'s' if len(found) > 1 else ''} {', '.join(names)}{more}"
