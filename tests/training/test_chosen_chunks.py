"""Chunks of heads that the recipe chooses, where one chunk does not fit: they are told, and the losses are the same."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from omegaconf import OmegaConf

pytest.importorskip("transformers")

from ringattn.memory.planning.limits import GIB
from ringattn.training import making
from ringattn.training.memory_plan import MemoryPlan
from tests.training.recipe import prepared
from tests.training.test_runs import curve, run

# Attention is what most of the memory goes to.
SHAPE = ["model.config.num_key_value_heads=4", "model.config.hidden_size=32", "model.config.intermediate_size=48"]
SHAPE += ["model.config.num_attention_heads=4", "data.seq_len=2048", "data.packs_per_step=1", "run.dtype=float32"]
SHAPE += ["memory=longest", "memory.margin=0"]
STEPS = 4


def plan_with(chunks: int, *overrides: str) -> MemoryPlan:
    return prepared(*SHAPE, f"parallel.head_chunks={chunks}", *overrides, ranks=2).plan


def peak(chunks: int) -> int:
    """Bytes on the device."""
    choice = plan_with(chunks).choice
    assert choice is not None
    return choice.plan.peak().total


@pytest.fixture(scope="module")
def tight() -> str:
    """Memory that two chunks fit and one does not."""
    assert peak(2) < peak(1)
    return f"memory.gpu_memory={(peak(1) + peak(2)) / 2 / GIB}"


def test_chunks_are_chosen_and_told(tight: str) -> None:
    job = prepared(*SHAPE, tight, ranks=2)
    chunks = job.cfg.parallel.head_chunks
    assert chunks in (2, 4)
    assert job.plan.head_chunks == chunks
    assert f", parallel.head_chunks={chunks}; planned: " in job.plan.note
    assert "warning" not in job.plan.note
    with mock.patch.object(making, "parallelize") as called:
        making._attach(mock.Mock(), job, mock.Mock())
    assert called.call_args.kwargs["head_chunks"] == chunks
    assert OmegaConf.to_container(prepared(*SHAPE, tight, ranks=2).cfg) == OmegaConf.to_container(job.cfg)


def test_one_chunk_is_kept_where_it_fits() -> None:
    job = prepared(*SHAPE, ranks=2)
    assert job.cfg.parallel.head_chunks == 1
    assert "head_chunks" not in job.plan.note
    assert prepared(*SHAPE, "memory=off", ranks=2).cfg.parallel.head_chunks is None, "nothing is open"


def test_a_number_of_the_user_stays(tight: str) -> None:
    job = prepared(*SHAPE, tight, "parallel.head_chunks=4", ranks=2)
    assert job.cfg.parallel.head_chunks == 4
    assert job.plan.head_chunks is None
    with pytest.raises(ValueError, match=r"would fit with .*parallel\.head_chunks=2"):
        plan_with(1, tight)


def test_advice_names_the_group_of_a_key() -> None:
    plan, other = plan_with(1), plan_with(2)
    assert plan.choice is not None
    assert other.choice is not None
    found: Any = ("head_chunks", 2, other.choice.settled)
    with mock.patch.object(type(plan.choice), "smaller", return_value=found):
        assert plan.advice(1).startswith("parallel.head_chunks=2 (saves 0.00 GiB by plan)")


def test_a_run_has_the_losses_of_one_chunk(tmp_path: Path, tight: str) -> None:
    short = [*SHAPE, f"run.steps={STEPS}", "run.save_every=0", "run.log_every=1"]
    chosen = run(tmp_path / "chosen", 2, *short, tight)
    whole = run(tmp_path / "one", 2, *short)
    assert "parallel.head_chunks=" in chosen
    assert "parallel.head_chunks=" not in whole
    kept = [OmegaConf.load(tmp_path / name / "config.yaml").parallel.head_chunks for name in ("chosen", "one")]
    assert kept[0] > kept[1] == 1
    found, expected = curve(tmp_path / "chosen"), curve(tmp_path / "one")
    assert len(found) == len(expected) == STEPS
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
