"""Copies in memory that a start does not go on from are told of, and what would take them does."""

import io
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

from ringattn.training.checkpoint.memory_copies import copies_folder
from ringattn.training.loop import Trainer
from ringattn.training.resuming.passed_over import Newer, newest_whole
from ringattn.training.start.output import write_config
from tests.pool import Pools
from tests.training.recipe import prepared
from tests.training.resuming.test_keeping import SHORT, train


def started(output: Path, *overrides: str, ranks: int = 1) -> tuple[Trainer, str]:
    """A start as `loop.train` makes one, and what it says."""
    job = prepared(*SHORT, f"run.output={output}", "data.packs_per_step=1", *overrides, ranks=ranks)
    with redirect_stdout(io.StringIO()) as said:
        trainer = Trainer(job)
    if trainer.keeping._rank == 0:
        write_config(job.cfg, output, job.model_config)
    return trainer, said.getvalue()


def copied(output: Path, folder: Path, ranks: int = 1) -> list[tuple[float, float]]:
    """A run that is lost after step 5, with a checkpoint of step 2 and a copy of step 4: its losses to step 7."""
    folder.mkdir(parents=True, exist_ok=True)
    given = ("run.save_every=5", "run.memory_every=4", f"run.memory_folder={folder}")
    trainer, _ = started(output, *given, ranks=ranks)
    found = train(trainer, 2)
    trainer.save()
    found += train(trainer, 4)
    trainer.keeping.due = lambda step, last: []  # type: ignore[method-assign]
    return found + train(trainer, 7)


def passed_over(output: Path) -> tuple[list[str], int]:
    folder = output / "memory"
    losses = copied(output, folder)
    here = (f"run.memory_folder={folder}",)
    said = [started(output, *here)[1], started(output)[1]]
    trainer, nothing = started(output, *here, "run.memory_every=4")
    assert nothing.startswith("going on from the copy in memory")
    assert len(nothing.splitlines()) == 1
    assert train(trainer, 7) == losses[4:]
    return said, trainer.step


def test_newer_copies_are_told_of_with_the_keys_that_take_them(pool: Pools, tmp_path: Path) -> None:
    ((said, step),) = pool(1).run(passed_over, tmp_path)
    warning = (
        f"warning: copies in memory of step 4 in {tmp_path}/memory are passed over, and this run goes on from step 2; "
        "to go on from them stop this run and start it with run.memory_every=4"
    )
    # The second start is without either key, after one whose configuration has run.memory_every=0.
    assert said == [f"{warning}\n", f"{warning.removesuffix('4')}N run.memory_folder={tmp_path}/memory\n"]
    assert step == 7


def other_curve(output: Path) -> tuple[str, int, list[int]]:
    here, other = f"run.memory_folder={output / 'memory'}", ("optim.lr=0.01", "run.resume=force")
    copied(output, output / "memory")
    shutil.copytree(output / "memory", output / "kept")
    _, said = started(output, here, *other)
    passed = started(output, here, "run.memory_every=4", *other)[0].step
    # The same from the start, with copies: killed twice before it saves anything.
    shutil.rmtree(output / "memory")
    (output / "kept").rename(output / "memory")
    started(output, here, "run.resume=force")
    steps = [started(output, here, "run.memory_every=4", *other)[0].step for _ in range(2)]
    return said, passed, steps


def test_copies_of_the_curve_before_are_nobodys_once_another_was_forced(pool: Pools, tmp_path: Path) -> None:
    ((said, passed, steps),) = pool(1).run(other_curve, tmp_path)
    assert said.endswith("this run goes on from step 2: they are of the configuration before\n")
    assert passed == 2
    assert steps == [4, 4], "a start that is forced takes the copy, and the next one too"


def brought_back(output: Path) -> tuple[int, str]:
    """A backup of the folder comes back after a start was forced to go on with another rate and left a copy."""
    given = (f"run.memory_folder={output / 'memory'}", "run.memory_every=2")
    (output / "memory").mkdir(parents=True)
    train(started(output, *given)[0], 2)
    Trainer(prepared(*SHORT, f"run.output={output}", "data.packs_per_step=1", *given)).save()
    backup = output.with_name("backup")
    shutil.copytree(output, backup, ignore=shutil.ignore_patterns("memory"))
    train(started(output, *given, "optim.lr=0.01", "run.resume=force")[0], 4)
    shutil.copytree(backup, output, dirs_exist_ok=True)
    trainer, said = started(output, *given)
    return trainer.step, said


def test_copies_of_another_curve_do_not_come_back_with_a_backup(pool: Pools, tmp_path: Path) -> None:
    ((step, said),) = pool(1).run(brought_back, tmp_path / "run")
    assert step == 2
    assert "copy in memory" not in said


def ended_without(output: Path, last: int) -> bool:
    """Whether copies are left of a run that went on without them, and was stopped."""
    here = f"run.memory_folder={output / 'memory'}"
    copied(output, output / "memory")
    trainer, _ = started(output, here)
    train(trainer, last)
    trainer.save()
    trainer.keeping.finish()
    return copies_folder(output / "memory", output).exists()


@pytest.mark.parametrize(("last", "left"), [(3, True), (5, False)])
def test_copies_go_once_the_run_is_past_them(pool: Pools, tmp_path: Path, last: int, left: bool) -> None:
    assert pool(1).run(ended_without, tmp_path, last) == [left]


def on_by_other_ranks(output: Path, ranks: int) -> tuple[str, list[tuple[float, float]], list[str]]:
    given = ("run.save_every=0", "run.memory_every=2", f"run.memory_folder={output / 'memory'}")
    trainer, said = started(output, *given, ranks=ranks)
    found = train(trainer, 9)
    trainer.keeping._saves.wait()
    copies = copies_folder(output / "memory", output)
    return said, found, sorted(str(path.relative_to(copies)) for path in copies.glob("*/*"))


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_another_number_of_ranks_goes_on_from_copies(pool: Pools, tmp_path: Path, before: int, after: int) -> None:
    whole = pool(1).run(undisturbed, tmp_path / "whole")[0]
    pool(before).run(copied, tmp_path / "run", tmp_path / "run" / "memory", before)
    (said, found, copies), *_ = pool(after).run(on_by_other_ranks, tmp_path / "run", after)
    assert said.startswith("going on from the copy in memory")
    assert "warning" not in said
    assert [one for pair in found for one in pair] == pytest.approx(
        [one for pair in whole[4:] for one in pair], rel=1e-5
    )
    assert copies == [f"rank-{rank:05d}/step-00000008" for rank in range(after)], "those of the ranks before are gone"


def undisturbed(output: Path) -> list[tuple[float, float]]:
    return train(started(output, "run.save_every=0")[0], 9)


@given(st.data())
def test_only_what_is_whole_and_newer_is_told_of(data: st.DataObject) -> None:
    """Against a plain statement of what should be."""
    which = st.tuples(st.sampled_from("ab"), st.integers(1, 4), st.integers(1, 3))
    machines = data.draw(st.lists(st.dictionaries(which, st.lists(st.integers(0, 2), max_size=3)), max_size=3))
    step = data.draw(st.integers(0, 4))
    all_of = {key for one in machines for key in one}
    whole = [
        Newer(at, count, folder)
        for folder, at, count in all_of
        if at > step and all(any(rank in one.get((folder, at, count), ()) for one in machines) for rank in range(count))
    ]
    assert newest_whole(machines, step) == (max(whole) if whole else None)
