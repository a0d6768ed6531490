"""The tuner: what it chooses, checks, keeps and tells."""

import json
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ringattn.kernels.tuning.store import SCHEMA, Store
from ringattn.kernels.tuning.tuner import Choice, Key, Problem, Tuner, bucket, digest, timed_ms
from tests.pool import Pools

FAST, SLOW, WRONG = {"tile": 1}, {"tile": 2}, {"tile": 3}


def check(choice: Choice) -> str | None:
    if choice == {"tile": 4}:
        raise FloatingPointError("no such tile")
    return "wrong gradients" if choice == WRONG else None


def problem(name: str = "test", candidates: tuple[Choice, ...] = (SLOW, WRONG, FAST), **changes: Any) -> Problem:
    """The slow candidate is the default."""
    settings: dict[str, Any] = {
        "candidates": lambda: candidates,
        "default": lambda: SLOW,
        "check": check,
        "run": lambda choice: float(choice["tile"]),
        "device": "cpu",
    }
    return Problem(Key.of(name, "cpu", {}), **settings | changes)


def make(folder: Path, policy: str = "on") -> tuple[Tuner, list[str]]:
    """A tuner whose clock believes what a run returns, and the kinds of its events as they come."""
    kinds: list[str] = []
    return Tuner(Store(folder), policy, [lambda event: kinds.append(event.kind)], lambda run, device: run()), kinds


def test_each_tier_answers_before_the_next(tmp_path: Path) -> None:
    first, kinds = make(tmp_path)
    assert first.select(problem()) == FAST
    assert kinds == ["timed", "refused", "timed", "measured"]
    assert first.select(problem()) == FAST
    assert kinds[4:] == ["memory"]
    assert first.select(problem(), override={"tile": 9}) == {"tile": 9}
    assert kinds[5:] == ["override"]

    second, kinds = make(tmp_path, policy="off")
    assert second.select(problem()) == FAST
    assert kinds == ["disk"]
    assert second.select(problem("another")) == SLOW
    assert kinds[1:] == ["default"]


def test_explain_tells_the_way_to_a_choice(tmp_path: Path) -> None:
    tuner, _ = make(tmp_path)
    key = problem().key
    assert tuner.explain(key) == "not asked yet"
    for _ in range(3):
        tuner.select(problem())
    told = tuner.explain(key)
    assert "refused: {'tile': 3} wrong gradients" in told
    assert "measured: {'tile': 1}" in told
    assert told.count("memory") == 1


def test_a_failing_candidate_is_skipped_and_all_failing_raise(tmp_path: Path) -> None:
    tuner, _ = make(tmp_path)
    assert tuner.select(problem("some", ({"tile": 4}, FAST))) == FAST
    with pytest.raises(RuntimeError, match=r"wrong gradients.*FloatingPointError: no such tile"):
        tuner.select(problem("all", (WRONG, {"tile": 4})))
    with pytest.raises(RuntimeError, match="there is none"):
        tuner.select(problem("none", ()))
    assert tuner.store is not None
    assert tuner.store.read(str(problem("all").key)) is None


def test_a_candidate_that_fails_while_timed_is_skipped(tmp_path: Path) -> None:
    def run(choice: Choice) -> float:
        if choice == FAST:
            raise torch.cuda.OutOfMemoryError("too large")
        return 1.0

    assert make(tmp_path)[0].select(problem(run=run)) == SLOW


def test_time_is_measured_after_warming_up_and_within_the_budget() -> None:
    calls: list[float] = []

    def run() -> None:
        time.sleep(0.05 if len(calls) == 0 else 0.002)  # the first run compiles
        calls.append(time.perf_counter())

    assert 1.5 < timed_ms(run, "cpu", budget_ms=20.0) < 15.0
    assert len(calls) <= 2 + 10
    calls.clear()
    assert timed_ms(run, "cpu", budget_ms=1.0) > 1.0
    assert len(calls) == 2


@pytest.mark.gpu
def test_cuda_events_time_the_device() -> None:
    small, large = (torch.randn(n, n, device="cuda") for n in (256, 8192))
    assert timed_ms(lambda: small @ small, "cuda") < timed_ms(lambda: large @ large, "cuda")


def choose_together(folder: str) -> tuple[Choice, list[str]]:
    """Each rank has its own folder and finds another candidate fastest; only rank 0's counts."""
    rank = dist.get_rank()
    tuner, kinds = make(Path(folder) / str(rank))
    mine = problem("together", (SLOW, FAST) if rank == 0 else (SLOW,))
    choice = tuner.select(mine, group=dist.group.WORLD)
    tuner.select(mine, group=dist.group.WORLD)
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest(choice))
    assert len(set(digests)) == 1
    return choice, kinds


def fail_together(mode: str, folder: str) -> str:
    rank = dist.get_rank()
    tuner, _ = make(Path(folder) / str(rank))
    mine = problem("keys" + str(rank)) if mode == "keys" else problem("fail", (WRONG,) if rank == 0 else (FAST,))
    try:
        tuner.select(mine, group=dist.group.WORLD)
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_rank_0_decides_and_ranks_never_disagree(pool: Pools, tmp_path: Path) -> None:
    (choice, kinds), (other, other_kinds) = pool(2).run(choose_together, str(tmp_path))
    assert choice == other == FAST
    assert kinds == ["timed", "timed", "measured", "told", "memory"]
    assert other_kinds == ["told", "memory"]
    assert [folder.name for folder in tmp_path.iterdir()] == ["0"]


def test_errors_reach_every_rank(pool: Pools, tmp_path: Path) -> None:
    first, second = pool(2).run(fail_together, "candidates", str(tmp_path))
    assert first == second
    assert "wrong gradients" in first
    first, second = pool(2).run(fail_together, "keys", str(tmp_path))
    assert first == second
    assert "disagree" in first


def test_a_few_tokens_more_are_the_same_key() -> None:
    for exponent in range(4, 21):
        assert bucket(2**exponent - 1) == bucket(2**exponent) == bucket(2**exponent + 1) == 2**exponent
    assert [bucket(n) for n in (0, 1, 2, 3, 5, 6, 11, 12)] == [0, 1, 2, 4, 4, 8, 8, 16]


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    tuner, kinds = make(tmp_path / "file" / "ringattn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert tuner.select(problem("one")) == FAST
        assert tuner.select(problem("two")) == FAST
    assert ["cannot keep tuning results" in str(warning.message) for warning in caught] == [True]
    assert kinds.count("measured") == 2


def test_nothing_is_created_before_the_first_write(tmp_path: Path) -> None:
    tuner, _ = make(tmp_path / "cache", policy="off")
    tuner.select(problem())
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("policy", ["on", "off"])
def test_an_override_holds_under_every_policy_and_is_not_kept(tmp_path: Path, policy: str) -> None:
    tuner, kinds = make(tmp_path, policy)
    assert tuner.select(problem(), override={"tile": 9}) == {"tile": 9}
    assert kinds == ["override"]
    assert not any(tmp_path.iterdir())
    assert tuner.select(problem()) != {"tile": 9}


def test_a_default_does_not_stand_in_the_way_of_a_measurement(tmp_path: Path) -> None:
    assert make(tmp_path, "off")[0].select(problem()) == SLOW
    assert make(tmp_path, "on")[0].select(problem()) == FAST


def test_the_stored_file_says_what_was_measured(tmp_path: Path) -> None:
    tuner, _ = make(tmp_path)
    tuner.select(problem())
    content = json.loads((tmp_path / f"tuning-{SCHEMA}.json").read_text())
    (entry,) = content["entries"].values()
    assert entry["choice"] == FAST
    assert entry["ms"] > 0
