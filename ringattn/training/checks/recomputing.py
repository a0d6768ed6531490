"""A step that is computed twice, against hardware that computes wrong without a word.

With two replicas and more each computes the packs of the next one first, so that every pack is computed on other
devices too; else, or where masks of dropout would differ, the same ranks do the same twice. What is compared are two
numbers of the global batch: the mean loss, and the norm of the gradient where the engine can take a backward pass back.
A fault that changes neither by more than rounding does is not seen.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ringattn.hf.model import unwrapped
from ringattn.hf.shape import weighed_layers
from ringattn.parallel.mesh.mesh import SequenceMesh
from ringattn.training.engines import Engine
from ringattn.training.failures import FailedTogether
from ringattn.training.health.incidents import record_incident
from ringattn.training.loss import Brought
from ringattn.training.packs.batches import Batch
from ringattn.training.packs.ordering import AnyCorpus
from ringattn.training.packs.placing import LocalPack, placed
from ringattn.training.packs.sharing import read

# Relative. Kernels whose gradients depend on the order in which they finish are off by less.
LOSS, NORM = 1e-5, 1e-3
KIND = "silent-fault"


class SilentFault(FailedTogether):
    """Two computations of one step differ; raised by all ranks alike."""

    restart = True


class FirstTime(NamedTuple):
    """What a step gave when it was computed first; the norm is None where it is not known."""

    loss: float
    norm: float | None
    where: str


def compute_first(
    engine: Engine,
    forward: Callable[[LocalPack, int], Tensor],
    batch: Batch[LocalPack],
    mesh: SequenceMesh,
    corpus: AnyCorpus,
    policy: str,
    device: torch.device,
) -> FirstTime:
    """All passes of a step, and none of their effects: no gradient stays and the random generators are as before.
    Collective.

    Arguments:
        forward: of a pack, with the targets of its replica in the step.
    """
    other = mesh.data > 1 and not _draws(engine.model)
    replica = (mesh.data_rank + 1) % mesh.data if other else mesh.data_rank
    micro = batch.micro
    if other:
        plans = batch.plans[replica :: mesh.data]
        layers = weighed_layers(unwrapped(engine.model))
        micro = tuple(placed(read(plan, corpus), mesh, policy, layers) for plan in plans)
    targets = batch.targets_of(replica, mesh.data)
    loss = torch.zeros((), device=device)
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices), torch.set_grad_enabled(engine.goes_back_twice):
        for local in micro:
            share = forward(local, targets)
            if engine.goes_back_twice:
                engine.backward(share)
            loss += share.detach()
    norm = float(engine.norm()) if engine.goes_back_twice else None
    engine.forget()
    return FirstTime(float(loss), norm, "on another replica" if other else "on the same ranks")


def check_same(output: Path, step: int, first: FirstTime, then: Brought, exact: bool) -> None:
    """Raises SilentFault if the two computations of a step differ by more than rounding; rank 0 records it.

    Arguments:
        output: the run's folder.
        exact: the same ranks compute the same bits.
    """
    exact = exact and first.where == "on the same ranks"
    pairs = [("loss", first.loss, then.loss, LOSS)]
    pairs += [] if first.norm is None else [("gradient norm", first.norm, then.norm, NORM)]
    for name, before, after, tolerance in pairs:
        same = before == after or (not exact and math.isclose(before, after, rel_tol=tolerance))
        if not same and (math.isfinite(before) or math.isfinite(after)):
            message = (
                f"step {step} was computed twice and its {name} is {before:.9g} the first time, {first.where}, and "
                f"{after:.9g} the second: hardware computes wrong, and no checkpoint holds this step"
            )
            if dist.get_rank() == 0:
                record_incident(output, KIND, message, step=step)
            raise SilentFault(message)


def _draws(model: nn.Module) -> bool:
    """Whether a pass draws random numbers, other ones on other ranks."""
    config = getattr(getattr(model, "module", model), "config", None)
    of_attention = getattr(config, "attention_dropout", 0.0) or 0.0
    return of_attention > 0 or any(isinstance(part, _DropoutNd) and part.p > 0 for part in model.modules())
