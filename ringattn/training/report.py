"""What a run tells: progress, metrics.jsonl, loss.png, TensorBoard. On other ranks than 0 every call does nothing."""

import importlib.util
from pathlib import Path

from ringattn.training.data_keys import described
from ringattn.training.job import Job
from ringattn.training.metrics import MetricsFile, Progress, StepMetrics, TensorBoard, read_metrics
from ringattn.training.plot import plot_loss


class Report:
    """Opened at the first step of a run, or to go on after `step`. Use it as a context manager."""

    def __init__(self, job: Job, step: int, parameters: int, enabled: bool) -> None:
        self._enabled = enabled
        if not enabled:
            return
        run = job.cfg.run
        self._output: Path = job.output
        self._title = f"{job.cfg.model.name} on {job.cfg.data.name}, {job.cfg.data.seq_len:,} tokens a pack"
        self._output.mkdir(parents=True, exist_ok=True)
        print(_opening(job, step, parameters), flush=True)
        self._file = MetricsFile(self._output / "metrics.jsonl", step)
        self._board = TensorBoard(self._output / "tensorboard", step) if run.tensorboard else None
        self._progress = Progress(step, run.steps, run.log_every)

    def step(self, metrics: StepMetrics) -> None:
        """Records one step."""
        if not self._enabled:
            return
        self._file.write(metrics)
        if self._board is not None:
            self._board.write(metrics)
        self._progress.update(metrics)

    def saved(self) -> None:
        """Draws the curve; called after each checkpoint."""
        if not self._enabled or importlib.util.find_spec("matplotlib") is None:
            return
        plot_loss(read_metrics(self._output / "metrics.jsonl"), self._output / "loss.png", self._title)

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._enabled:
            return
        self._progress.close()
        self._file.close()
        if self._board is not None:
            self._board.close()


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
