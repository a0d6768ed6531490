"""A run as it lies in its folder: configuration, model, and the checkpoint that is exported."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringattn.training.checkpoint.folders import Found, found_in
from ringattn.training.checkpoint.marker import BadCheckpoint, TrainState
from ringattn.training.checkpoint.saved_state import SavedState
from ringattn.training.checkpoint.tensors import check_sum
from ringattn.training.model.architecture import reason_of
from ringattn.training.model.lora import Lora, lora_of
from ringattn.training.resuming.best import BestSteps
from ringattn.training.start.output import CONFIG, MODEL, config_of, read_config


@dataclass(frozen=True)
class RunFolder:
    """A run with a good checkpoint.

    Arguments:
        path: its folder.
        cfg: its resolved configuration, as it was kept.
        model_config: the transformers configuration that was trained.
        state: of the checkpoint.
        saved: its tensors.
        warnings: what was passed over on the way.
    """

    path: Path
    cfg: dict[str, Any]
    model_config: Any
    state: TrainState
    saved: SavedState
    warnings: tuple[str, ...] = ()

    @property
    def lora(self) -> Lora | None:
        """Its factors, or None."""
        return lora_of(self.cfg["model"])

    @property
    def base(self) -> str | None:
        """The folder of the model that it began with."""
        path: str | None = self.cfg["model"].get("path")
        return path


def open_run(path: Path, step: int | None = None, best: bool = False) -> RunFolder:
    """A run and its newest good checkpoint, or that of a step, or that with the least validation loss.

    Checksums are verified: every byte is read once more. Raises ValueError naming what is missing or damaged.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is no folder; it must be that of a run (run.output)")
    cfg, values = read_config(path)
    for name, found in ((CONFIG, cfg), (MODEL, values)):
        if found is None:
            raise ValueError(f"{path} is no run: it holds no {name}")
    assert cfg is not None
    assert values is not None
    chosen, warnings = _checkpoint(path, step, best)
    assert chosen.marker is not None
    saved = SavedState.of(chosen.folder, 0)
    return RunFolder(path, cfg, _model_config(path, values), chosen.marker.state, saved, tuple(warnings))


def _model_config(path: Path, values: dict[str, Any]) -> Any:
    try:
        return config_of(values)
    except Exception as error:  # of another version of transformers, of any type
        raise ValueError(f"{path / MODEL} is no configuration of this transformers: {reason_of(error)}") from None


def _checkpoint(path: Path, step: int | None, best: bool) -> tuple[Found, list[str]]:
    found = list(found_in(path / "checkpoints"))
    if not found:
        raise ValueError(f"{path} holds no checkpoint: nothing was trained there yet (run.save_every says when)")
    if step is not None:
        found = [one for one in found if one.step == step] or _none_of(path, f"of step {step}", found)
    if best:
        steps = BestSteps(path, len(found))([one.step for one in found])
        if not steps:
            raise ValueError(
                f"{path}: no checkpoint is of a step with a validation loss, so that none is known to be the best"
            )
        found = sorted((one for one in found if one.step in steps), key=lambda one: steps.index(one.step))
    warnings = list[str]()
    for one in found:
        if not (reason := one.reason or _damage(one)):
            return one, warnings
        if one.old or step is not None or best:  # another one is not what was asked for
            raise BadCheckpoint(reason)
        warnings.append(f"not taken: {reason}")
    raise BadCheckpoint(f"no checkpoint in {path / 'checkpoints'} can be used: {'; '.join(warnings)}")


def _none_of(path: Path, what: str, found: list[Found]) -> list[Found]:
    steps = ", ".join(str(one.step) for one in reversed(found))
    raise ValueError(f"{path} holds no checkpoint {what}, only of steps {steps}")


def _damage(one: Found) -> str:
    """Why the files of a checkpoint do not hold what was written, or ""."""
    assert one.marker is not None
    try:
        for name, expected in one.marker.files.items():
            check_sum(one.folder / name, expected)
    except BadCheckpoint as error:
        return str(error)
    return ""
