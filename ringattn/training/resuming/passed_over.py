"""Newer copies in memory that a start does not go on from: the user is told which, and what would take them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from ringattn.training.checkpoint.memory_copies import copies_folder, held_parts, known_run
from ringattn.training.checkpoint.together import Together
from ringattn.training.config.curve import curve_digest
from ringattn.training.secrets import redacted
from ringattn.training.start.job import Job
from ringattn.training.start.output import read_config

ADVICE = "to go on from them stop this run and start it with"
OTHER = "they are of the configuration before"
Held = Mapping[tuple[str, int, int], Sequence[int]]


class Newer(NamedTuple):
    """A copy that machines hold together.

    Arguments:
        step, ranks: steps in it, and the number of ranks that wrote it.
        folder: `run.memory_folder` of the start that wrote it.
    """

    step: int
    ranks: int
    folder: str


def runs_of(run: str, job: Job) -> tuple[str, str]:
    """What copies of a run are marked with: by this start, and by the one before it, whose configuration is still in
    the folder; "" where it is not. A copy of neither is of another curve: the run's folder may have been brought back
    from a backup, or a start was forced to go on with other values.

    Arguments:
        run: what tells it from other runs in the folder.
    """
    before = _config(job.output)
    now: dict[str, Any] = redacted(OmegaConf.to_container(job.cfg))  # as it is saved
    return f"{run}-{curve_digest(now)}", f"{run}-{curve_digest(before)}" if before else ""


def tell_passed_over(job: Job, step: int, together: Together) -> None:
    """Warns of copies in memory, of this run, that are newer than the step a start goes on from. Collective.

    A start without run.memory_every does not look for them, one with another run.memory_folder looks elsewhere, and
    DeepSpeed's are read by as many ranks alone. They stay while the start does not write there, so that it may be
    stopped and started with them.
    """
    before, now = _config(job.output).get("run", {}), job.cfg.run
    run = known_run(job.output / "checkpoints")
    folders = {str(folder) for folder in (before.get("memory_folder"), now.memory_folder) if folder}
    for number, one in enumerate(dict.fromkeys(runs_of(run, job) if run else ())):
        newer = newest_whole(together.gather(_held(folders, job.output, one)), step)
        if newer is not None:
            # The configuration of the start before is about to be replaced.
            advice = f": {OTHER}" if number else f"; {ADVICE} {_keys(newer, before, now, together.count)}"
            if together.rank == 0:
                print(
                    f"warning: copies in memory of step {newer.step} in {newer.folder} are passed over, and this run "
                    f"goes on from {f'step {step}' if step else 'the start'}{advice}",
                    flush=True,
                )
            return


def newest_whole(held: Sequence[Held], step: int) -> Newer | None:
    """The newest copy after a step of which machines hold the parts of all ranks.

    Arguments:
        held: by each rank of this start, what its machine has: numbers of ranks by folder, step and number of ranks.
    """
    parts: dict[tuple[str, int, int], set[int]] = {}
    for one in held:
        for which, ranks in one.items():
            parts.setdefault(which, set()).update(ranks)
    whole = [Newer(at, count, folder) for (folder, at, count), ranks in parts.items() if ranks >= set(range(count))]
    return max((one for one in whole if one.step > step), default=None)


def _config(output: Path) -> dict[str, Any]:
    """That of the start before; nothing where it cannot be read, which matters to those that go on from a checkpoint,
    and was told to them."""
    try:
        return read_config(output)[0] or {}
    except ValueError:
        return {}


def _held(folders: set[str], output: Path, run: str) -> Held:
    held = {}
    for folder in folders:
        for (step, count), parts in held_parts(copies_folder(Path(folder), output), (run,)).items():
            held[folder, step, count] = sorted(parts)
    return held


def _keys(newer: Newer, before: Mapping[str, Any], now: Any, ranks: int) -> str:
    """What a start has to be given to go on from a copy."""
    keys = []
    if not now.memory_every:
        keys.append(f"run.memory_every={before.get('memory_every') or 'N'}")
    if newer.folder != now.memory_folder:
        keys.append(f"run.memory_folder={newer.folder}")
    if newer.ranks != ranks and not keys:
        keys.append(f"{newer.ranks} ranks, as wrote them")
    return " ".join(keys) or "the machines that hold them"
