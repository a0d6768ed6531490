"""What a run tells: progress, metrics.jsonl, loss.png, trackers. Other ranks than 0 do nothing in any call."""

import importlib.util
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ringattn.training.checkpoint import Place
from ringattn.training.config.data_keys import described
from ringattn.training.report.in_order import InOrder
from ringattn.training.report.metrics import MetricsFile, Progress, StepMetrics
from ringattn.training.report.plot import LossCurve
from ringattn.training.report.trackers import Trackers, wanted
from ringattn.training.secrets import redacted
from ringattn.training.start.job import Job

LAST_WORDS = 10.0  # seconds in which a run that failed still writes what it knows, before other ranks hear of it


class Report:
    """Opened at the first step of a run, or to go on after `step`. Use it as a context manager.

    Files and trackers are written by threads: all ranks would wait for a disk that a save keeps busy, or a network
    that is slow for a moment. What a killed process had not written yet is missing, steps of milliseconds as a rule;
    none of them is a step before the last save (`written`), which would not be done again.
    """

    def __init__(self, job: Job, step: int, parameters: int, enabled: bool) -> None:
        self._enabled = enabled
        if not enabled:
            return
        run = job.cfg.run
        self._output: Path = job.output
        self._output.mkdir(parents=True, exist_ok=True)
        print(redacted(_opening(job, step, parameters)), flush=True)
        metrics = self._output / "metrics.jsonl"
        self._file = MetricsFile(metrics, step)
        title = f"{job.cfg.model.name} on {job.cfg.data.name}, {job.cfg.data.seq_len:,} tokens a pack"
        self._curve = LossCurve(metrics, self._output / "loss.png", title)
        config: Any = redacted(OmegaConf.to_container(job.cfg))
        self._trackers = Trackers(wanted(run.trackers, run.tensorboard), self._output, config, step)
        self._progress = Progress(step, run.steps, run.log_every)
        self._draws = importlib.util.find_spec("matplotlib") is not None
        self._aside, self._far = InOrder("metrics"), InOrder("trackers")

    def step(self, metrics: StepMetrics) -> None:
        """Records one step."""
        if not self._enabled:
            return
        self._aside(partial(self._file.write, metrics))
        self._far(partial(self._trackers.write, metrics))
        self._progress.update(metrics)

    def validated(self, step: int, losses: dict[str, float]) -> None:
        """Adds to metrics.jsonl what validation sets say of the step that the run goes on from; trackers, which have
        that step, are not told."""
        if self._enabled:
            self._aside(partial(self._file.validated, step, losses))

    def back_to(self, step: int) -> None:
        """The run went back: what was recorded of later steps is dropped."""
        if not self._enabled:
            return
        self._aside(partial(self._file.back_to, step))
        self._far(partial(self._trackers.back_to, step))

    def written(self) -> None:
        """Before a save: waits until metrics.jsonl has the steps that a restart will not do again."""
        if self._enabled:
            self._aside.wait()

    def saved(self, places: Sequence[Place]) -> None:
        """Draws the curve, while the training goes on; called after each save, and does so after one on disk."""
        on_disk = any(place.shared for place in places)
        if self._enabled and on_disk and self._draws:
            self._aside(self._curve.draw)  # once the file has all steps

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if not self._enabled:
            return
        failed = kind is not None
        with ExitStack() as last:  # backwards
            last.callback(self._trackers.close)
            last.callback(self._file.close)
            last.callback(self._curve.leave if failed else self._curve.close)
            self._progress.close()
            for thread in (self._aside, self._far):
                with suppress(Exception) if failed else nullcontext():
                    thread.close(LAST_WORDS if failed else None)


def _opening(job: Job, step: int, parameters: int) -> str:
    cfg, corpus = job.cfg, job.corpus
    p = cfg.parallel
    plot = "" if importlib.util.find_spec("matplotlib") else "\nno loss.png: matplotlib is not installed"
    notes = "".join(f"{note}\n" for note in job.notes)
    return (
        f"{notes}{cfg.model.name}: {parameters:,} parameters, {cfg.run.dtype}, {cfg.engine.name}, "
        f"lr {cfg.optim.lr:g}\n"
        f"{cfg.data.name}: {described(corpus)}; packs of "
        f"{cfg.data.seq_len:,} tokens, {cfg.data.packs_per_step} a step\n"
        f"{job.launch.world_size} ranks on {job.device.type}: data {p.data} × ring {p.ring} × ulysses {p.ulysses}, "
        f"scheme {p.scheme}, policy {p.policy}, backend {p.backend}\n"
        f"{'from step ' + str(step) if step else 'from the start'} to {cfg.run.steps}, into {job.output}{plot}"
    )
