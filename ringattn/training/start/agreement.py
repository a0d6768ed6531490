"""What all ranks of a run must have alike is compared, not assumed: before anything is made together, and as it goes.

Before: the configuration key by key, the code, the documents, the model, the checkpoint to go on from. Later: which
step it is, its packs, the learning rate, weights that every rank holds whole, the optimizer's numbers. The step and its
packs are compared in every step, with what a step brings to the host anyway; the rest every `run.check_every` steps.
"""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

import ringattn
from ringattn.training.config.checks import flat
from ringattn.training.config.data_keys import described
from ringattn.training.failures import FailedTogether
from ringattn.training.health.incidents import record_incident
from ringattn.training.ranks import differences, joined
from ringattn.training.start.job import Job
from ringattn.training.start.meeting import CannotStart, Meeting
from ringattn.training.start.output import model_values

# What machines may have apart: places of files (their contents are compared), and what does not change a step.
OWN = {"data.files", "data.cache", "data.tokenizer", "data.prefetch", "data.ahead", "model.path", "engine.compile"}
OWN |= {"data.sources", "data.validation", "data.chat_template", "data.processes", "run.memory_folder"}
VERSIONS = ("torch", "transformers", "deepspeed", "torchao", "peft", "numpy")
ADVICE = {
    "memory.": "give memory.gpu_memory and memory.host_memory, those of the smallest machine",
    "the documents": "data.files must hold the same on every machine",
    "the checkpoint": "run.output must be on a file system that all machines share",
    "the code": "install the same ringattn on every machine",
}


class Disagreement(FailedTogether):
    """Ranks of a run that goes on are not one run any more; all of them raise it, with the same message."""

    restart = True  # from a checkpoint all ranks begin alike


def meet(job: Job) -> None:
    """All ranks compare what they are about to do, and join the default process group if that is the same, and anything
    is left to do. Collective.

    Raises CannotStart, with the same message on every rank, naming keys, values and ranks that differ, or a rank that
    refused, or one that did not come within run.start_timeout seconds.
    """
    launch = job.launch
    if launch.world_size == 1 or dist.is_initialized():
        return
    mine = record_of(job)
    meeting = Meeting(launch, float(job.cfg.run.start_timeout))
    if len(set(meeting.everyone(digest_of(mine)))) > 1:
        lines = differences(meeting.details(mine))
        meeting.leave()
        raise CannotStart(f"ranks were not started alike: {joined(lines)}{_advice(lines)}")
    if job.done:
        meeting.leave()
    else:
        meeting.join()


def record_of(job: Job) -> dict[str, Any]:
    """What ranks must have alike when they start, by name."""
    values: dict[str, Any] = flat(OmegaConf.to_container(job.cfg))  # type: ignore[arg-type]
    plan = {key: value for key, value in values.items() if key.startswith("memory.")}  # follows from the rest
    own = {key for key in values if key in OWN or key.startswith("data.validation.")}
    record = {key: value for key, value in values.items() if key not in own and key not in plan}
    record |= {f"model.config.{key}": value for key, value in model_values(job.model_config).items()}
    record["the documents"] = f"{described(job.corpus)} ({job.corpus.fingerprint})"
    record["the checkpoint"] = "none" if job.resume is None else f"that of step {job.resume[1].step}"
    return record | plan | code_version()


@cache
def code_version() -> dict[str, str]:
    """A hash of every source file of the package, and the versions of what it computes with."""
    home = Path(ringattn.__file__).parent
    version = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in VERSIONS:
        try:
            version[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version[name] = "(absent)"
    for path in sorted(home.rglob("*.py")):
        version[f"the code ringattn/{path.relative_to(home).as_posix()}"] = hashlib.sha256(
            path.read_bytes()
        ).hexdigest()[:12]
    return version


def digest_of(values: Mapping[str, Any]) -> str:
    """A short hash of values that JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _advice(lines: list[str]) -> str:
    told = [advice for start, advice in ADVICE.items() if any(line.startswith(start) for line in lines)]
    return "".join(f"; {one}" for one in told)


class Agreement:
    """Compares ranks as a run goes on. Made, and called, by all ranks at the same places.

    Arguments:
        output: the run's folder.
        device: where this rank computes.
        every: steps between comparisons; 0: only before the first step of a process.
    """

    def __init__(self, output: Path, device: torch.device, every: int) -> None:
        self._output, self._device, self._every = output, device, every
        self._first = True

    def due(self, step: int) -> bool:
        """Whether ranks are to be compared before the step after `step`; true once at the start."""
        first, self._first = self._first, False
        return first or (self._every > 0 and step % self._every == 0)

    def compare(self, step: int, facts: Mapping[str, Any]) -> None:
        """Collective: one small reduction, and one more exchange where ranks differ.

        Arguments:
            step: steps that are done.
            facts: by name, the same names on every rank; scalars of a device are read.

        Raises Disagreement on every rank, naming what differs, and rank 0 records it.
        """
        if dist.get_world_size() == 1:
            return
        read = {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in facts.items()}
        number = int(digest_of(read)[:15], 16)
        bounds = torch.tensor([number, -number], device=self._device)
        dist.all_reduce(bounds, dist.ReduceOp.MAX)
        highest, lowest = bounds.tolist()
        if highest != -lowest:
            self.explain(step, read)

    def explain(self, step: int, facts: Mapping[str, Any]) -> None:
        """Raises what `compare` raises, once it is known that ranks differ. Collective."""
        answers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, dict(facts))
        message = f"ranks are not one run any more after step {step}: {joined(differences(answers))}"
        if dist.get_rank() == 0:
            record_incident(self._output, "disagreement", message, step=step)
        raise Disagreement(message)
