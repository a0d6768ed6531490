"""Every rank takes the same checkpoint, and it is a good one."""

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ringattn.training.checkpoint import BadCheckpoint, OldCheckpoint, Place, TrainState
from ringattn.training.checkpoint.memory_copies import make_rank_folder
from ringattn.training.checkpoint.snapshot import snapshot_of
from ringattn.training.checkpoint.together import Together
from ringattn.training.checkpoint.writing import write_checkpoint
from ringattn.training.health.incidents import read_incidents
from ringattn.training.resuming.restoring import choose
from tests.pool import Pools
from tests.training.checkpoint.test_saved_state import Bomb


def state(step: int) -> TrainState:
    return TrainState(step, 0, {}, "abc", "fsdp2", dist.get_world_size())


def tree(step: int) -> dict[str, Any]:
    return {"x": torch.full((1000,), float(step)), "rank": dist.get_rank()}


def saved(output: Path, steps: list[int], in_memory: list[int], run: str = "r") -> None:
    """Checkpoints of some steps on disk, and all copies that were ever made of some in memory."""
    together = Together()
    disk, memory = places(output, run, keep=9)
    for step in steps:
        write_checkpoint(disk, state(step), snapshot_of(tree(step)), together)
    for step in in_memory:
        write_checkpoint(memory, state(step), snapshot_of(tree(step)), together)
    together.close()


def places(output: Path, run: str = "r", keep: int = 1) -> tuple[Place, Place]:
    own = make_rank_folder(output / "memory", dist.get_rank())
    return Place(output / "checkpoints", keep), Place(own, keep, shared=False, kind="copy in memory", run=run)


def chosen(output: Path, run: str = "r", before: int | None = None) -> tuple[int, str, int] | None:
    """Step, kind and what was saved of this rank, of the checkpoint that is taken."""
    together = Together()
    try:
        found = choose(output, *places(output, run), together, before)
        if found is None:
            return None
        opened = found.opened(dist.get_rank())
        assert torch.equal(opened.own("x"), tree(found.state.step)["x"])
        return found.state.step, found.place.kind, opened.own("rank")
    finally:
        together.close()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)


def test_nothing_is_there(pool: Pools, tmp_path: Path) -> None:
    assert pool(2).run(chosen, tmp_path) == [None, None]
    assert not (tmp_path / "incidents").exists()


def test_the_newer_of_disk_and_memory_is_taken(pool: Pools, tmp_path: Path) -> None:
    pool(2).run(saved, tmp_path, [4, 8], [3, 6])
    assert pool(2).run(chosen, tmp_path) == [(8, "checkpoint", rank) for rank in range(2)]
    pool(2).run(saved, tmp_path, [], [9])
    assert pool(2).run(chosen, tmp_path) == [(9, "copy in memory", rank) for rank in range(2)]


def test_copies_that_not_all_have_do_not_count(pool: Pools, tmp_path: Path) -> None:
    pool(2).run(saved, tmp_path, [4], [6, 9])
    memory = tmp_path / "memory"
    (memory / "rank-00001" / "step-00000009").rename(memory / "rank-00001" / "step-00000009.partial")
    assert pool(2).run(chosen, tmp_path) == [(6, "copy in memory", rank) for rank in range(2)]
    assert pool(2).run(chosen, tmp_path, "another run") == [(4, "checkpoint", rank) for rank in range(2)]


def whole(output: Path, count: int) -> tuple[int, str, list[Any]] | None:
    """Step, kind, and what another number of ranks saved, of what is taken."""
    together = Together()
    try:
        found = choose(output, *places(output), together)
        if found is None:
            return None
        opened = found.opened(dist.get_rank())
        first = [float(opened._part(rank).rows("x", 0, 1)) for rank in range(count)]
        return found.state.step, found.place.kind, first
    finally:
        together.close()


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (3, 2)])
def test_copies_of_another_number_of_ranks_are_taken(pool: Pools, tmp_path: Path, before: int, after: int) -> None:
    """A machine that holds all parts serves any number of ranks, as a disk does."""
    pool(before).run(saved, tmp_path, [4], [6, 9])
    assert pool(after).run(whole, tmp_path, before) == [(9, "copy in memory", [9.0] * before)] * after
    flip(tmp_path / "memory" / f"rank-{before - 1:05d}" / "step-00000009" / f"rank-{before - 1:05d}.safetensors")
    assert pool(after).run(whole, tmp_path, before) == [(6, "copy in memory", [6.0] * before)] * after
    shutil.rmtree(tmp_path / "memory" / f"rank-{before - 1:05d}")
    assert pool(after).run(whole, tmp_path, before) == [(4, "checkpoint", [4.0] * before)] * after


def saved_by_deepspeed(output: Path) -> None:
    together = Together()
    for place, step in zip(places(output), (4, 6), strict=True):
        write_checkpoint(place, replace(state(step), engine="deepspeed"), snapshot_of(tree(step)), together)
    together.close()


def test_copies_of_deepspeed_are_taken_by_as_many_ranks(pool: Pools, tmp_path: Path) -> None:
    pool(2).run(saved_by_deepspeed, tmp_path)
    assert pool(1).run(chosen, tmp_path) == [(4, "checkpoint", 0)]
    assert pool(2).run(chosen, tmp_path) == [(6, "copy in memory", rank) for rank in range(2)]


def test_a_damaged_copy_is_left_for_the_one_before(pool: Pools, tmp_path: Path) -> None:
    pool(2).run(saved, tmp_path, [4], [6, 9])
    flip(tmp_path / "memory" / "rank-00001" / "step-00000009" / "rank-00001.safetensors")
    assert pool(2).run(chosen, tmp_path) == [(6, "copy in memory", rank) for rank in range(2)]
    (incident,) = read_incidents(tmp_path)
    assert incident["kind"] == "bad-checkpoint"
    assert "rank-00001/step-00000009/rank-00001.safetensors is damaged" in incident["message"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_damaged_checkpoint_is_named_whoever_reads_it(pool: Pools, tmp_path: Path, rank: int) -> None:
    pool(2).run(saved, tmp_path, [4, 8, 12], [])
    checkpoints = tmp_path / "checkpoints"
    flip(checkpoints / "step-00000012" / f"rank-{rank:05d}.safetensors")
    (checkpoints / "step-00000008" / "complete.json").write_text("{")
    (checkpoints / "step-00000016.partial").mkdir()
    assert pool(2).run(chosen, tmp_path) == [(4, "checkpoint", one) for one in range(2)]
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["step-00000004", "step-00000008.bad", "step-00000012.bad"]
    told = [one["message"] for one in read_incidents(tmp_path)]
    assert f"step-00000012/rank-{rank:05d}.safetensors is damaged: its checksum is" in told[0]
    assert "step-00000008/complete.json is damaged" in told[1]
    assert pool(2).run(chosen, tmp_path) == [(4, "checkpoint", one) for one in range(2)]
    assert len(read_incidents(tmp_path)) == 2, "named once"


def test_where_none_is_good_nothing_is_begun_anew(pool: Pools, tmp_path: Path) -> None:
    """Not at the next start either: what is bad keeps its name."""
    pool(2).run(saved, tmp_path, [4, 8], [])
    for step in (4, 8):
        flip(tmp_path / "checkpoints" / f"step-{step:08d}" / "rank-00000.safetensors")
    for _ in range(2):
        with pytest.raises(BadCheckpoint, match=r"no checkpoint in .* can be used: .*step-00000008.*step-00000004"):
            pool(2).run(chosen, tmp_path)
    with pytest.raises(BadCheckpoint, match=r"no checkpoint"):
        pool(2).run(chosen, tmp_path, before=2)


def test_taken_back_to_a_step_before(pool: Pools, tmp_path: Path) -> None:
    """The later ones are not found again when the run comes by their steps."""
    pool(2).run(saved, tmp_path, [4, 8, 12], [13])
    assert pool(2).run(chosen, tmp_path, before=9) == [(8, "checkpoint", rank) for rank in range(2)]
    assert pool(2).run(chosen, tmp_path) == [(8, "checkpoint", rank) for rank in range(2)]
    pool(2).run(saved, tmp_path, [12], [])
    assert pool(2).run(chosen, tmp_path) == [(12, "checkpoint", rank) for rank in range(2)]


def elsewhere(output: Path) -> Any:
    """Ranks on machines with folders of their own."""
    return chosen(output / str(dist.get_rank()))


def test_ranks_that_see_different_folders_are_told(pool: Pools, tmp_path: Path) -> None:
    pool(1).run(saved, tmp_path / "0", [4], [])
    with pytest.raises(RuntimeError, match=r"must be on a file system that all machines share; .*\[4, -1\]"):
        pool(2).run(elsewhere, tmp_path)


OF_OLD = [".metadata", "random-00000.pt", "zero/mp_rank_00_model_states.pt", "__0_0.distcp"]


@pytest.mark.parametrize("name", OF_OLD)
def test_a_pickle_of_an_earlier_version_is_refused_and_not_run(pool: Pools, tmp_path: Path, name: str) -> None:
    old, ran = tmp_path / "checkpoints" / "step-00000012", tmp_path / "ran"
    pool(2).run(saved, tmp_path, [4], [])
    (old / name).parent.mkdir(parents=True)
    (old / name).write_bytes(pickle.dumps(Bomb(ran)))
    (old / "complete.json").write_text(json.dumps({"step": 12, "tokens": 0, "position": {}, "engine": "fsdp2"}))
    with pytest.raises(OldCheckpoint, match=r"step-00000012 was written by a version of ringattn whose .* pickles"):
        pool(2).run(chosen, tmp_path)
    assert not ran.exists()


@pytest.mark.parametrize("name", [name for name in OF_OLD if "/" not in name])
def test_a_pickle_beside_the_files_is_refused_and_not_run(pool: Pools, tmp_path: Path, name: str) -> None:
    ran = tmp_path / "ran"
    pool(2).run(saved, tmp_path, [4, 8], [])
    (tmp_path / "checkpoints" / "step-00000008" / name).write_bytes(pickle.dumps(Bomb(ran)))
    assert pool(2).run(chosen, tmp_path) == [(4, "checkpoint", rank) for rank in range(2)]
    assert f"{name} is not of this checkpoint: it is named like a pickle" in read_incidents(tmp_path)[0]["message"]
    assert not ran.exists()


def test_a_folder_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "copies").mkdir()
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    with pytest.raises(OSError, match="is not a folder of this user"):
        make_rank_folder(tmp_path / "copies", 0)
