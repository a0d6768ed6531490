"""What a run is made of is not looked at again by the collector, and what a run leaves is."""

import gc
import weakref
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from ringattn.training.garbage import Garbage
from ringattn.training.loop import Trainer
from ringattn.training.report.telling import Report
from tests.pool import Pools
from tests.training.recipe import prepared


class Ring:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.itself = self


def test_what_is_garbage_goes_first_and_what_stays_is_seen_again_afterwards():
    first = weakref.ref(Ring())
    with Garbage() as garbage:
        garbage.settle()
        assert first() is None
        assert gc.get_freeze_count() > 0
        second = weakref.ref(Ring())
        garbage.settle()
        assert second() is None
        kept = Ring()
        garbage.settle()
        third = weakref.ref(kept)
        del kept
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert third() is None


def seen_in_steps(output: Path) -> tuple[int, int, int]:
    """The most objects that a full look would see in a later step, before, and what is frozen at the end."""
    sizes = ("data.seq_len=64", "model.config.hidden_size=32", "model.config.num_hidden_layers=1")
    trainer = Trainer(prepared(f"run.output={output}", "run.steps=4", "run.save_every=0", *sizes))
    before, seen = len(gc.get_objects()), [0]
    step = trainer._train_step

    def watched(*args):
        done = step(*args)
        if trainer.step > 1:
            seen.append(len(gc.get_objects()))
        return done

    trainer._train_step = watched  # type: ignore[method-assign]
    with Report(trainer.job, trainer.step, 1, True) as report:
        trainer.run(report)
    return max(seen), before, gc.get_freeze_count()


def test_a_full_look_in_a_step_sees_few(pool: Pools, tmp_path: Path) -> None:
    seen, before, frozen = pool(1).run(seen_in_steps, tmp_path)[0]
    assert 0 < seen < before / 10
    assert frozen == 0
