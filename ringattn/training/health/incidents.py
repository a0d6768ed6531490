"""What went wrong in a run and how it ended: files in its folder that people, launchers and reports read.

torchrun ends with exit code 1 whatever its ranks return, so how a run ended, and whether to start it again, stands in
`exit.json`.
"""

import json
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ringattn.training.health.places import read_json
from ringattn.training.secrets import redacted

INCIDENTS, EXIT = "incidents", "exit.json"


@dataclass(frozen=True)
class Ending:
    """How a run ended, as `exit.json` says it.

    Arguments:
        state: `done` (all steps), `stopped` (a signal asked for it; a checkpoint was saved) or `failed`.
        restart: whether the same command, started again, goes on with a chance to come further.
        why: one sentence for people.
        step: optimiser steps that a checkpoint on disk holds.
        rank: that ended the run; None where all of them did.
        time: UTC, ISO 8601.
        copy: steps that a newer copy in memory holds, which only a start on the same machines finds; 0 without one.
    """

    state: str
    restart: bool
    why: str
    step: int
    rank: int | None = None
    time: str = ""
    copy: int = 0


def record_incident(output: Path, kind: str, message: str, rank: int | None = None, **facts: Any) -> Path | None:
    """Writes `incidents/TIME-KIND[-rankN].json` with the message and further facts, complete or not at all.

    Arguments:
        kind: one or few words with hyphens, such as `bad-checkpoint`; the same for every incident of a kind.
        facts: what JSON can hold.

    Returns the file, or None where it could not be written: what went wrong matters more than its record.
    """
    now = datetime.now(UTC)
    of_rank = "" if rank is None else f"-rank{rank}"
    path = output / INCIDENTS / f"{now:%Y%m%dT%H%M%S.%fZ}-{kind}{of_rank}.json"
    record = {"time": now.isoformat(), "kind": kind, "rank": rank, "message": message} | facts
    return path if _written(path, record) else None


def read_incidents(output: Path) -> list[dict[str, Any]]:
    """All incidents of a run, oldest first; files that cannot be read are passed over."""
    records = []
    for path in sorted((output / INCIDENTS).glob("*.json")):
        record = read_json(path)
        if record is not None:
            records.append(record)
    return records


def write_ending(output: Path, ending: Ending) -> bool:
    """Writes `exit.json` in the place of an older one; False where that was impossible."""
    now = datetime.now(UTC).isoformat()
    return _written(output / EXIT, asdict(ending) | {"time": ending.time or now})


def read_ending(output: Path) -> Ending | None:
    """How the newest run in a folder ended; None if that is not known."""
    record = read_json(output / EXIT)
    try:
        return None if record is None else Ending(**record)
    except TypeError:
        return None


def _written(path: Path, record: dict[str, Any]) -> bool:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(redacted(record), indent=2) + "\n")
        partial.replace(path)
    except OSError:
        return False
    return True
