"""Before a run starts: its folder is its own, or it is refused, and who waits for it hears that."""

import os
import sys
from pathlib import Path

from omegaconf import DictConfig

from ringattn.training.health import places
from ringattn.training.health.incidents import EXIT, Ending, read_ending, write_ending
from ringattn.training.health.lock import Lock, is_free, take
from ringattn.training.start.job import Job
from ringattn.training.start.launched import is_first, speaks_for_machine


def refused(cfg: DictConfig, error: Exception) -> None:
    """Says to the launcher, and in the run's folder if there is one and no run is in it, that a start was refused."""
    if not speaks_for_machine(os.environ):
        return
    tell_launcher(error)
    try:
        output = Path(cfg.run.output).expanduser().resolve()
    except Exception:  # the refusal may be about it
        return
    if is_first(os.environ) and output.is_dir() and is_free(output) and not _last_said(output):
        write_ending(output, Ending("failed", False, f"refused: {error}", places.newest_step(output)))


def tell_launcher(error: Exception) -> None:
    """Says to the command that started torchrun, if one did, that a rank refuses to run."""
    refusal = places.refusal_file(os.getppid())
    if speaks_for_machine(os.environ) and refusal.exists():
        refusal.write_text(str(error))


def hold(job: Job) -> Lock:
    """The folder of a run, held by its rank 0, and without what an earlier run said of its end; of other ranks nothing.

    Raises ValueError if another run is in the folder, or if this start follows one that would only fail again.
    """
    if job.done or job.launch.rank != 0:
        return Lock(-1)
    if last := _last_said(job.output):
        raise ValueError(f"not started again, it would come to the same end: {last}")
    before = places.newest_step(job.output)
    lock, note = take(job.output)
    if note:
        print(f"warning: {note}", file=sys.stderr, flush=True)
    newest = places.newest_step(job.output)
    if newest != before:
        lock.release()
        raise ValueError(
            f"run.output={job.output}: another run wrote the checkpoint of step {newest} while this one waited for it; "
            "start again to go on from there"
        )
    # From here on exit.json says what goes wrong.
    places.refusal_file(os.getppid()).unlink(missing_ok=True)
    for path in (job.output / EXIT, *(job.output / places.HEALTH).glob("verdict-*.json")):
        path.unlink(missing_ok=True)
    return lock


def _last_said(output: Path) -> str:
    """Why torchrun's start before this one failed, if it would fail again; "" otherwise, and at a first start."""
    if not int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0):
        return ""
    ending = read_ending(output)
    return ending.why if ending is not None and ending.state == "failed" and not ending.restart else ""
