"""A run goes back to a step before, on disk or in memory, and from there along the same curve."""

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from ringattn.training.checkpoint import BadCheckpoint
from ringattn.training.checkpoint.memory_copies import copies_folder, rank_folder
from ringattn.training.loop import Trainer
from ringattn.training.output import write_config
from tests.pool import Pools
from tests.training.recipe import prepared

SHORT = ("run.steps=9", "data.seq_len=64", "model.config.hidden_size=32", "model.config.num_hidden_layers=1")
SHORT += ("model.config.num_attention_heads=4", "model.config.num_key_value_heads=2", "run.keep=5")


def train(trainer: Trainer, last: int) -> list[tuple[float, float]]:
    """Losses and gradient norms up to a step."""
    found = []
    with trainer._batches() as stream:
        while trainer.step < last:
            done = trainer._train_step(next(stream), False)
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
