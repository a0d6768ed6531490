"""A run goes back to a step before, on disk or in memory, and from there along the same curve."""

import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("transformers")

from ringattn.training.checkpoint import BadCheckpoint, TrainState
from ringattn.training.checkpoint.folders import discard_older, found_in
from ringattn.training.checkpoint.host_copy import HostCopy
from ringattn.training.checkpoint.marker import Marker, write_marker
from ringattn.training.checkpoint.memory_copies import copies_folder, rank_folder
from ringattn.training.loop import Trainer
from ringattn.training.report.telling import Report
from ringattn.training.resuming.best import BestSteps
from ringattn.training.start.output import write_config
from tests.pool import Pools
from tests.training.checkpoint.late import LateStream, differing
from tests.training.recipe import prepared

SHORT = ("run.steps=9", "data.seq_len=64", "model.config.hidden_size=32", "model.config.num_hidden_layers=1")
SHORT += ("model.config.num_attention_heads=4", "model.config.num_key_value_heads=2", "run.keep=5")


def train(trainer: Trainer, last: int) -> list[tuple[float, float]]:
    """Losses and gradient norms up to a step."""
    found = []
    with trainer._batches() as stream:
        while trainer.step < last:
            done = trainer._train_step(next(stream))
            found.append((done.loss, done.norm))
            trainer.save(trainer.keeping.due(trainer.step, False))
    return found


def back(output: Path, *overrides: str) -> bool:
    trainer = Trainer(prepared(*SHORT, f"run.output={output}", "run.save_every=2", *overrides))
    assert not trainer.restore()
    first = train(trainer, 7)
    assert trainer.restore(before=5)
    assert trainer.step == 4
    again = train(trainer, 7)
    assert trainer.restore()
    assert trainer.step == 6
    trainer.keeping.finish()
    return first[4:] == again


@pytest.mark.parametrize("overrides", [(), ("run.async_save=true",)], ids=["now", "in a thread"])
def test_back_to_a_checkpoint_before(pool: Pools, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    assert pool(1).run(back, tmp_path, *overrides) == [True]
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000004", "step-00000006", "step-00000006.bad"]


def late_copies(output: Path, held: bool, *overrides: str) -> tuple[list[str], int, set[str]]:
    told: list[str] = []

    def late(copy: HostCopy) -> Callable[[], None]:
        copy._stream = stream = LateStream(told)  # type: ignore[assignment]
        return stream.arrive

    return told, *differing(output, late, held, *SHORT, *overrides)


def test_a_copy_beside_the_next_step_is_of_its_moment(pool: Pools, tmp_path: Path) -> None:
    """Weights and moments are copied just before the optimizer's step, buffers that a pass changes were before."""
    told, count, names = pool(1).run(late_copies, tmp_path / "held", True)[0]
    assert told == ["copied"] * 3
    assert count > 90
    assert names == set()
    _, _, names = pool(1).run(late_copies, tmp_path / "loose", False)[0]
    assert {"engine/model/lm_head.weight", "engine/optim/lm_head.weight/exp_avg"} <= names
    assert not any("passes" in name for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_so_it_is_with_deepspeed(pool: Pools, tmp_path: Path, stage: int) -> None:
    pytest.importorskip("deepspeed")
    given = ("engine=deepspeed", f"engine.zero_stage={stage}")
    told, count, names = pool(1).run(late_copies, tmp_path / "held", True, *given)[0]
    assert told == ["copied"] * 3
    assert count > 15
    assert names == set()
    _, _, names = pool(1).run(late_copies, tmp_path / "loose", False, *given)[0]
    assert any(name.endswith("exp_avg") for name in names)
    assert not any("passes" in name for name in names)


def back_from_a_late_copy(output: Path) -> list[str]:
    told: list[str] = []
    trainer = Trainer(prepared(*SHORT, f"run.output={output}", "run.async_save=true"))
    load = trainer.engine.load
    trainer.engine.load = lambda saved: told.append("loaded") or load(saved)  # type: ignore
    trainer.keeping._saves._copy._stream = stream = LateStream(told)  # type: ignore
    trainer.save()
    threading.Timer(0.2, stream.arrive).start()
    assert trainer.restore()
    return told


def test_nothing_is_loaded_before_what_is_there_is_copied(pool: Pools, tmp_path: Path) -> None:
    assert pool(1).run(back_from_a_late_copy, tmp_path)[0] == ["copied", "loaded"]


def in_memory(output: Path) -> None:
    given = (*SHORT, f"run.output={output}", "run.save_every=0", "run.memory_every=2", f"run.memory_folder={output}")
    trainer = Trainer(prepared(*given))
    own = rank_folder(copies_folder(output, output), 0)
    assert train(trainer, 5)
    assert [path.name for path in own.iterdir()] == ["step-00000004"]
    again = Trainer(prepared(*given))
    assert again.step == 4
    # A run that is begun anew does not go on from the one before, nor does it keep its copies.
    (output / "checkpoints" / "run.json").unlink()
    assert Trainer(prepared(*given)).step == 0
    assert list(own.iterdir()) == []
    trainer.keeping.finish()
    assert not own.parent.exists()


def test_copies_in_memory_are_of_their_run_alone(pool: Pools, tmp_path: Path) -> None:
    pool(1).run(in_memory, tmp_path)


def another_curve(output: Path) -> None:
    given = (*SHORT, f"run.output={output}", "run.save_every=0", "run.memory_every=2", f"run.memory_folder={output}")
    job = prepared(*given)
    write_config(job.cfg, output, job.model_config)
    train(Trainer(job), 2)
    Trainer(prepared(*given, "optim.lr=0.01"))


def test_a_copy_of_another_curve_is_refused_in_one_line(pool: Pools, tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"holds a run with another configuration: optim\.lr was 0\.003"):
        pool(1).run(another_curve, tmp_path)


def test_the_best_stay_beside_the_newest(tmp_path: Path) -> None:
    """What has no validation loss is never among the best."""
    root, losses = tmp_path / "checkpoints", {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: 5.0, 6: None}
    for step in losses:
        (root / f"step-{step:08d}").mkdir(parents=True)
        write_marker(root / f"step-{step:08d}", Marker(TrainState(step, 0, {}, "", "fsdp2", 1), {}))
    lines = [{"step": step, "validation": loss and {"a": loss - 0.5, "b": loss + 0.5}} for step, loss in losses.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    discard_older(root, 1, 6, BestSteps(tmp_path, 2))
    assert [found.step for found in found_in(root)] == [6, 4, 2]
    discard_older(root, 1, 6, BestSteps(tmp_path, 0))
    assert [found.step for found in found_in(root)] == [6]


def test_what_a_run_wrote_before_is_read_once_and_not_at_each_save(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "validation": {"a": float(step)}} for step in (1, 2, 3, 4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    best = BestSteps(tmp_path, 2)
    path.unlink()
    assert best([1, 2, 3, 4]) == [1, 2]
    best.back_to(2)  # 3 and 4 will come again
    best.note(3, {"a": 0.5, "b": 1.0})
    best.note(4, None)
    assert best([2, 3, 4]) == [3, 2]


def test_a_loss_that_is_no_number_is_not_the_best(tmp_path: Path) -> None:
    """NaN is neither less nor more than any: among it a sort may leave the least loss anywhere."""
    best = BestSteps(tmp_path, 1)
    for step, loss in enumerate((2.0, math.nan, 1.0, math.inf), 1):
        best.note(step, {"a": loss})
    assert best([1, 2, 3, 4]) == [3]


def kept_best(output: Path) -> list[int]:
    """A run whose validation losses are told by step: a second start knows those of the first."""
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 0.5, 5: 4.0, 6: 5.0}
    given = (*SHORT, f"run.output={output}", "run.save_every=1", "run.keep=1", "run.keep_best=2", "run.resume=force")
    for last in (3, 6):
        trainer = Trainer(prepared(*given, f"run.steps={last}"))
        told = mock.patch.object(trainer.validation, "losses", lambda step: {"a": losses[step]})
        with told, Report(trainer.job, trainer.step, 1, True) as report:
            trainer.run(report)
    return [found.step for found in found_in(output / "checkpoints")]


def test_a_run_keeps_its_best_over_two_starts(pool: Pools, tmp_path: Path) -> None:
    assert pool(1).run(kept_best, tmp_path)[0] == [6, 4, 2]


def validated(output: Path, stop_after: int | None) -> list[dict[str, float] | None]:
    """What validation sets say by step, of a run that a signal stops after a step, and that is started again."""
    held_out = output.parent / "held-out.txt"
    held_out.write_text("a few words\n" * 20)
    given = (*SHORT, f"run.output={output}", "run.save_every=0", "run.evaluate_every=2")
    for last in dict.fromkeys((stop_after, None)):
        trainer = Trainer(prepared(*given, f"data.validation={{v: {held_out}}}"))
        step = trainer._train_step

        def stops(batch: Any, last: int | None = last, step: Any = step, trainer: Trainer = trainer) -> Any:
            trainer.stop.requested = trainer.step + 1 == last
            return step(batch)

        told = mock.patch.object(trainer, "_train_step", stops)
        with told, Report(trainer.job, trainer.step, 1, True) as report:
            trainer.run(report)
    return [json.loads(line)["validation"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_validation_that_a_signal_left_out_is_done_at_the_next_start(pool: Pools, tmp_path: Path) -> None:
    (losses,) = pool(1).run(validated, tmp_path / "stopped", 4)
    assert [step for step, one in enumerate(losses, 1) if one] == [2, 4, 6, 8, 9]
    assert [losses] == pool(1).run(validated, tmp_path / "whole", None)
