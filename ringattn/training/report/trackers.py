"""Where the numbers of a run go beside metrics.jsonl: TensorBoard, trackio, W&B, each by the same names.

A package is imported only when it is asked for. What fails in one costs a warning, and the run goes on without it.
"""

import importlib.util
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from ringattn.training.report.metrics import StepMetrics

PROJECT = "ringattn"
ID_FILE = "tracker-id"  # by which a run that goes on is the same one in trackio and W&B
NO_NUMBERS = ("step", "warmup", "skipped", "validation")


class Tracker(Protocol):
    """One of them, opened for one run."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records the numbers of a step."""

    def close(self) -> None:
        """Hands on what it holds."""


class TensorBoard:
    """Files under `tensorboard/` in the run's folder. Steps after the one it is opened at are dropped."""

    def __init__(self, output: Path, config: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """Hugging Face's local tracker, with its database under `trackio/` in the run's folder, or in TRACKIO_DIR."""

    def __init__(self, output: Path, config: Mapping[str, Any], step: int) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(output / "trackio"))  # it is read when trackio is imported
        import trackio

        project = os.environ.get("TRACKIO_PROJECT") or PROJECT
        name = f"{output.name}-{_identity(output)}"
        self._run: Any = trackio.init(project=project, name=name, config=dict(config), resume="allow")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class WandB:
    """Weights & Biases, with its files under `wandb/` in the run's folder. WANDB_MODE, WANDB_PROJECT and the other
    variables of its own hold."""

    def __init__(self, output: Path, config: Mapping[str, Any], step: int) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT") or PROJECT
        self._run: Any = wandb.init(
            project=project,
            name=output.name,
            id=_identity(output),
            resume="allow",
            dir=str(output),
            config=dict(config),
        )
        # Steps of its own only grow, and a run may go back to a checkpoint.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WandB,
}


def wanted(trackers: Sequence[str] | None, tensorboard: bool) -> list[str]:
    """The trackers of `run.trackers`, and TensorBoard where `run.tensorboard` asks for it, each once."""
    return list(dict.fromkeys([*(trackers or ()), *(["tensorboard"] if tensorboard else [])]))


def check_trackers(trackers: Any, tensorboard: bool) -> None:
    """Raises ValueError for a name that is none, and for a package that is not installed."""
    names = [] if trackers is None else trackers
    if not isinstance(names, list) or not all(isinstance(name, str) and name in TRACKERS for name in names):
        raise ValueError(
            f"run.trackers must be a list of {', '.join(TRACKERS)}, as in 'run.trackers=[trackio]', got {trackers!r}"
        )
    for name in wanted(names, tensorboard):
        if importlib.util.find_spec(name) is None:
            key = f"run.trackers=[{name}]" if name in names else f"run.{name}=true"
            raise ValueError(f"{key} needs the package: pip install {name}")


def numbers(metrics: StepMetrics) -> dict[str, float]:
    """What trackers are told of a step: names as in metrics.jsonl, `validation/NAME` for validation sets, and `skipped`
    as 1 in steps that were left out."""
    values = {name: value for name, value in asdict(metrics).items() if name not in NO_NUMBERS and value is not None}
    held_out = {f"validation/{name}": loss for name, loss in (metrics.validation or {}).items() if loss is not None}
    return values | held_out | ({"skipped": 1.0} if metrics.skipped else {})


class Trackers:
    """Those of a run, opened together; on the way the ones that fail are left out, with a warning.

    Arguments:
        output: the run's folder.
        config: the resolved configuration without secrets.
        step: that the run goes on after.
    """

    def __init__(self, names: Sequence[str], output: Path, config: Mapping[str, Any], step: int) -> None:
        self._output, self._config = output, config
        self._open: dict[str, Tracker] = {}
        for name in names:
            self._start(name, step)

    def _start(self, name: str, step: int) -> None:
        try:
            self._open[name] = TRACKERS[name](self._output, self._config, step)
        except Exception as error:  # libraries raise errors of their own, for networks and accounts
            _warn(name, error)

    def write(self, metrics: StepMetrics) -> None:
        """Hands a step to all of them."""
        values = numbers(metrics)
        for name, tracker in list(self._open.items()):
            try:
                tracker.write(metrics.step, values)
            except Exception as error:
                del self._open[name]
                _warn(name, error)

    def back_to(self, step: int) -> None:
        """The run went back. TensorBoard drops later steps; the others keep both, and show the last."""
        board = self._open.pop("tensorboard", None)
        if board is not None:
            board.close()
            self._start("tensorboard", step)

    def close(self) -> None:
        """Ends all of them."""
        for name, tracker in self._open.items():
            try:
                tracker.close()
            except Exception as error:
                _warn(name, error)


def _warn(name: str, error: Exception) -> None:
    print(f"warning: the run goes on without {name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def _identity(output: Path) -> str:
    """A name of the run that is no other's, the same when it goes on."""
    path = output / ID_FILE
    if path.is_file() and (known := path.read_text().strip()):
        return known
    made = uuid.uuid4().hex[:10]
    path.write_text(made + "\n")
    return made
