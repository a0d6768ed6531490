"""Sizes that do not fit the ranks give way where run.elastic says so, and the curve stays."""

import pytest

pytest.importorskip("transformers")

from ringattn.training.start.output import write_config
from tests.training.recipe import prepared

SIZES = ("parallel.data=2", "parallel.ring=2", "parallel.ulysses=2", "data.seq_len=64")


def sizes(*overrides: str, ranks: int) -> tuple[int, int, int, int]:
    job = prepared(*overrides, ranks=ranks)
    parallel = job.cfg.parallel
    return parallel.data, parallel.ring, parallel.ulysses, job.cfg.data.packs_per_step


def test_without_it_sizes_that_do_not_fit_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"run\.elastic=true lets sizes that do not fit give way"):
        prepared(*SIZES, f"run.output={tmp_path}", ranks=4)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [(8, (2, 2, 2)), (4, (2, 1, 2)), (2, (1, 1, 2)), (16, (2, 4, 2)), (6, (1, 3, 2)), (3, (1, 3, 1))],
)
def test_the_ring_gives_way_first_then_data(ranks: int, expected: tuple[int, int, int], tmp_path) -> None:
    overrides = (*SIZES, "data.packs_per_step=2", "run.elastic=true", f"run.output={tmp_path}")
    assert sizes(*overrides, ranks=ranks) == (*expected, 2)


def test_the_packs_of_a_step_stay_those_of_the_run(tmp_path) -> None:
    overrides = ("parallel.data=2", "data.seq_len=64", "run.elastic=true", f"run.output={tmp_path}")
    job = prepared(*overrides, ranks=2)
    assert job.cfg.data.packs_per_step == 2
    write_config(job.cfg, tmp_path)
    job = prepared(*overrides, ranks=1)
    assert job.cfg.data.packs_per_step == 2
    assert "run.elastic: parallel.data=2 does not fit 1 ranks, and is left to them" in job.notes


def test_what_cannot_be_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"run\.elastic=true: a DeepSpeed checkpoint is read by as many ranks"):
        prepared("engine=deepspeed", "run.elastic=true", f"run.output={tmp_path}")
    for wrong in ("run.hang_after=soon", "run.hang_after=0", "run.grace=0", "run.elastic=3"):
        with pytest.raises(ValueError, match=wrong.partition("=")[0]):
            prepared(wrong, f"run.output={tmp_path}")
