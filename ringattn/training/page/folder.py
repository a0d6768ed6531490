"""What a run's folder says, read as leniently as it can be: runs are looked at while they run, or after they broke."""

import base64
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ringattn.training.health.incidents import EXIT, read_ending, read_incidents
from ringattn.training.secrets import redacted

FILE = "run.json"
SIGNS = ("metrics.jsonl", FILE, EXIT, "config.yaml", "incidents", "checkpoints", "evaluation")
MIMES = {".png": "image/png", ".svg": "image/svg+xml", ".jpg": "image/jpeg"}
LARGEST_PICTURE = 8 << 20  # bytes
LONGEST_TEXT = 20_000  # signs of an evaluation's numbers
MOST_PICTURES = 40
LARGEST = 1e200


@dataclass(frozen=True)
class Evaluation:
    """What stands in `evaluation/` under one name.

    Arguments:
        picture: as a data URL, or empty.
        numbers: the JSON file, redacted; None where there is none.
        note: why something is not shown.
    """

    name: str
    picture: str = ""
    numbers: Any = None
    note: str = ""


@dataclass(frozen=True)
class State:
    """How a run stands: `word` is done, stopped, failed or open; `why` is a sentence."""

    word: str
    why: str


@dataclass
class RunFolder:
    """The files of a run. Numbers that are none are left out, lines that are no records are counted.

    Raises ValueError where `path` is no folder, or not that of a run.
    """

    path: Path
    broken: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not self.path.is_dir():
            raise ValueError(f"expected the folder of a run, got {self.path}, which is no folder")
        if not any((self.path / name).exists() for name in SIGNS):
            raise ValueError(f"{self.path} is not the folder of a run: it has none of {', '.join(SIGNS)}")
        self.steps = sorted(
            {line["step"]: line for line in self._lines("metrics.jsonl") if _is_count(line.get("step"))}.values(),
            key=lambda line: line["step"],
        )
        self.stragglers = [line for line in self._lines("stragglers.jsonl") if isinstance(line.get("behind"), list)]
        self.incidents = redacted(read_incidents(self.path))

    def series(self, key: str, of: Iterable[dict[str, Any]] | None = None) -> list[tuple[float, float]]:
        """(step, value) of every step that has a finite number under `key`."""
        return [(line["step"], line[key]) for line in (self.steps if of is None else of) if is_number(line.get(key))]

    @cached_property
    def validation(self) -> dict[str, list[tuple[float, float]]]:
        """(step, loss) by the name of the validation set."""
        found: dict[str, list[tuple[float, float]]] = {}
        for line in self.steps:
            sets = line.get("validation")
            for name, loss in sets.items() if isinstance(sets, dict) else ():
                if is_number(loss):
                    found.setdefault(str(name), []).append((line["step"], loss))
        return found

    @cached_property
    def record(self) -> dict[str, Any]:
        """run.json, or nothing."""
        found = _json(self.path / FILE)
        return redacted(found) if isinstance(found, dict) else {}

    def part(self, name: str) -> dict[str, Any]:
        """A part of run.json that has names, or nothing."""
        found = self.record.get(name)
        return found if isinstance(found, dict) else {}

    @cached_property
    def config(self) -> str:
        """The resolved configuration as YAML, or nothing."""
        try:
            text = (self.path / "config.yaml").read_text(errors="replace")
        except OSError:
            return ""
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError:
            return str(redacted(text))
        return yaml.safe_dump(redacted(values), sort_keys=False, allow_unicode=True, width=100)

    @cached_property
    def state(self) -> State:
        """From exit.json, unless the run was started again after it was written."""
        last = self.steps[-1]["step"] if self.steps else 0
        ending = read_ending(self.path)
        if ending is not None and str(ending.time) >= self._started():
            return State(str(ending.state), str(redacted(ending.why)))
        if is_number(self.record.get("steps")) and 0 < self.record["steps"] <= last:
            return State("done", "all steps are done")
        if not self.steps:
            return State("open", "no step was recorded yet")
        written = datetime.fromtimestamp((self.path / "metrics.jsonl").stat().st_mtime, UTC)
        return State("open", f"it runs or was killed: the last step was recorded at {written:%Y-%m-%d %H:%M:%S} UTC")

    def _started(self) -> str:
        """When the newest start was, as exit.json writes times."""
        starts = self.record.get("starts")
        newest = starts[-1] if isinstance(starts, list) and starts else None
        return str(newest.get("time", "")) if isinstance(newest, dict) else ""

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """Pictures and numbers of `evaluation/`, those of one name together; saved models first, then by step.

        A summary that repeats the numbers of files beside it is left out.
        """
        folder = self.path / "evaluation"
        files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
        names = sorted({path.relative_to(folder).with_suffix("") for path in files if path.suffix in (*MIMES, ".json")})
        found = [_evaluation(folder, name) for name in names[:MOST_PICTURES]]
        known = {one.name for one in found}
        return sorted((one for one in found if not _repeats(one, known)), key=_step_of)

    def _lines(self, name: str) -> list[dict[str, Any]]:
        try:
            lines = (self.path / name).read_text(errors="replace").splitlines()
        except OSError:
            return []
        found = [_parsed(line) for line in lines if line.strip()]
        records = [one for one in found if isinstance(one, dict)]
        self.broken += len(found) - len(records)
        return records


def _evaluation(folder: Path, name: Path) -> Evaluation:
    whole = folder / name
    numbers = _json(Path(f"{whole}.json"))
    picture = note = ""
    for suffix, mime in MIMES.items():
        path = Path(f"{whole}{suffix}")
        if picture or not path.is_file():
            continue
        try:
            size = os.path.getsize(path)
            if size > LARGEST_PICTURE:
                note = f"{path.name} has {size / 2**20:.0f} MiB and is not shown"
            else:
                picture = f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode()}"
        except OSError as error:
            note = f"{path.name} cannot be read: {error.strerror}"
    return Evaluation(str(name), picture, redacted(numbers), note)


def _repeats(one: Evaluation, known: set[str]) -> bool:
    """Whether it is the `evaluation.json` of tasks that all have files of their own."""
    tasks = one.numbers.get("tasks") if isinstance(one.numbers, dict) else None
    beside = Path(one.name).parent
    return isinstance(tasks, dict) and not one.picture and {str(beside / str(task)) for task in tasks} <= known


def _step_of(one: Evaluation) -> float:
    step = one.numbers.get("step") if isinstance(one.numbers, dict) else None
    return -1.0 if step is None or not is_number(step) else float(step)


def is_number(value: Any) -> bool:
    """Whether it is a number that can be drawn, and no switch: neither endless nor of hundreds of digits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and is_number(value)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _json(path: Path) -> Any:
    try:
        return _parsed(path.read_text(errors="replace"))
    except OSError:
        return None
