"""Checkpoints are complete or absent, wherever a process dies, and only good ones are found."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ringattn.training.checkpoint import (
    BadCheckpoint,
    OldCheckpoint,
    Place,
    SavedState,
    SaveFailed,
    TrainState,
    complete_checkpoints,
    folders,
    marker,
    newest_checkpoint,
    writing,
)
from ringattn.training.checkpoint.random_states import random_states, set_random_states
from ringattn.training.checkpoint.snapshot import snapshot_of
from ringattn.training.checkpoint.together import Together


@pytest.fixture(autouse=True)
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def state(step: int) -> TrainState:
    return TrainState(step, 10 * step, {"epoch": 0, "index": step, "offset": 3}, "abc", "fsdp2", 1)


def save(root: Path, step: int, keep: int = 2, tree: Any = None) -> Path:
    snapshot = snapshot_of(tree or {"weights": torch.arange(1000.0) + step})
    return writing.write_checkpoint(Place(root, keep), state(step), snapshot, Together())


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_the_newest_checkpoints_are_found_and_kept(tmp_path):
    root = tmp_path / "checkpoints"
    assert newest_checkpoint(root) is None
    for step in (5, 10, 15, 100):
        save(root, step)
    assert newest_checkpoint(root) == (root / "step-00000100", state(100))
    assert names(root) == ["step-00000015", "step-00000100"]


@pytest.mark.parametrize("moment", ["write", "marker", "rename"])
def test_death_while_saving_leaves_the_one_before(tmp_path, monkeypatch, moment):
    root = tmp_path / "checkpoints"
    save(root, 5, keep=1)

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "write":
            patch.setattr(writing, "write_part", die)
        elif moment == "marker":
            patch.setattr(marker.json, "dump", die)
        else:
            patch.setattr(Path, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            save(root, 10, keep=1)
    assert newest_checkpoint(root) == (root / "step-00000005", state(5))
    assert names(root) == ["step-00000005", "step-00000010.partial"]
    save(root, 10, keep=1)
    assert names(root) == ["step-00000010"]


def test_who_keeps_all_does_not_look_into_each_at_every_save(tmp_path, monkeypatch):
    root = tmp_path / "checkpoints"
    for step in (5, 10, 15):
        save(root, step, keep=100)
    looked = []
    monkeypatch.setattr(folders, "read_marker", lambda folder: looked.append(folder) or marker.read_marker(folder))
    folders.discard_older(root, 3, 15)
    assert not looked
    folders.discard_older(root, 2, 10)  # the later one does not count
    assert not looked
    folders.discard_older(root, 2, 15)
    assert names(root) == ["step-00000010", "step-00000015"]


def test_death_while_deleting_the_old_one(tmp_path, monkeypatch):
    root = tmp_path / "checkpoints"
    save(root, 5, keep=1)

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folders.shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            save(root, 10, keep=1)
    assert [path.name for path in complete_checkpoints(root)] == ["step-00000010"]


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    root = tmp_path / "checkpoints"
    before = (save(root, 5) / "rank-00000.safetensors").stat().st_mtime_ns
    assert (save(root, 5, tree={"other": 1}) / "rank-00000.safetensors").stat().st_mtime_ns == before


def test_what_was_written_short_never_replaces_the_good_one(tmp_path, monkeypatch):
    """A disk may say that it has written what it has not."""
    root = tmp_path / "checkpoints"
    save(root, 5, keep=1)

    def short(folder, rank, snapshot, before=writing.write_part):
        found = before(folder, rank, snapshot)
        os.truncate(folder / "rank-00000.safetensors", found.size - 4)
        return found

    monkeypatch.setattr(writing, "write_part", short)
    with pytest.raises(SaveFailed, match=r"rank 0: .*safetensors has 4,\d+ bytes, 4,\d+ were written"):
        save(root, 10, keep=1)
    assert names(root) == ["step-00000005"]


def test_a_full_disk_is_named_before_anything_is_written(tmp_path, monkeypatch):
    root = tmp_path / "checkpoints"
    save(root, 5, keep=1)
    (root / "step-00000007.partial").mkdir()  # left by a process that was killed
    usage = shutil.disk_usage(root)._replace(free=2**20)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SaveFailed, match=r"step-00000010 needs 1\.0 MiB and 1\.0 MiB are free in .*checkpoints"):
        save(root, 10, keep=1)
    assert names(root) == ["step-00000005"]


def damaged(root: Path, how: str) -> None:
    """Damages the newest checkpoint, of step 10."""
    folder = root / "step-00000010"
    part, mark = folder / "rank-00000.safetensors", folder / "complete.json"
    text = mark.read_text()
    if how == "truncated":
        os.truncate(part, part.stat().st_size - 100)
    elif how == "deleted part":
        part.unlink()
    elif how == "deleted marker":
        mark.unlink()
    elif how == "half a marker":
        mark.write_text(text[: len(text) // 2])
    elif how == "empty marker":
        mark.write_text("")
    elif how == "binary marker":
        mark.write_bytes(b"\xff\xfe\x00")
    elif how == "digit":
        mark.write_text(text.replace('"tokens": 100', '"tokens": 108'))
    elif how == "other step":
        shutil.copy(root / "step-00000005" / "complete.json", mark)
    elif how == "newer":
        mark.write_text(text.replace('"format": 2', '"format": 3'))
    elif how == "outside":
        body = json.loads(text)
        del body["checksum"]
        body["files"] = {"../../secret": [1, 2]}
        mark.write_text(json.dumps(body | {"checksum": marker._checksum(body)}))
    elif how == "pickle":
        (folder / "random-00000.pt").write_bytes(b"x")


REASONS = {
    "truncated": "rank-00000.safetensors has",
    "deleted part": "rank-00000.safetensors cannot be read: No such file",
    "deleted marker": "complete.json is not there",
    "half a marker": "complete.json is damaged: ",
    "empty marker": "complete.json is damaged: ",
    "binary marker": "complete.json is damaged: ",
    "digit": "complete.json is damaged: it does not have the checksum",
    "other step": "has the marker of step 5",
    "newer": "complete.json has format 3, of a newer version",
    "outside": "names files outside of its folder: ../../secret",
    "pickle": "random-00000.pt is not of this checkpoint: it is named like a pickle",
}


@pytest.mark.parametrize("how", REASONS)
def test_a_bad_one_is_passed_over_and_says_why(tmp_path, how):
    root = tmp_path / "checkpoints"
    save(root, 5)
    save(root, 10)
    damaged(root, how)
    newest = newest_checkpoint(root)
    assert newest is not None
    assert newest[1] == state(5)
    bad, good = list(folders.found_in(root))
    assert REASONS[how] in bad.reason
    assert "step-00000010" in bad.reason
    assert good.marker is not None
    # It does not count among those that are kept.
    save(root, 15, keep=2)
    assert [found.step for found in folders.found_in(root) if found.marker] == [15, 5]
    shutil.rmtree(root / "step-00000005")
    shutil.rmtree(root / "step-00000015")
    with pytest.raises(BadCheckpoint, match=r"no checkpoint in .* can be used: .*step-00000010.*to begin anew"):
        newest_checkpoint(root)


def test_one_of_an_earlier_version_is_refused_by_name(tmp_path):
    root = tmp_path / "checkpoints"
    save(root, 5)
    old = root / "step-00000010"
    old.mkdir()
    (old / "complete.json").write_text(json.dumps({"step": 10, "tokens": 1, "engine": "fsdp2"}))
    (old / ".metadata").write_bytes(b"x")
    with pytest.raises(OldCheckpoint, match=r"step-00000010 was written by a version of ringattn whose .*pickles"):
        newest_checkpoint(root)
    save(root, 15)
    newest = newest_checkpoint(root)
    assert newest is not None
    assert newest[1].step == 15


def test_random_states_come_back(tmp_path):
    def draw() -> tuple[float, float, float, float]:
        return random.random(), random.gauss(), float(np.random.normal()), torch.rand(()).item()  # noqa: NPY002

    draw()
    folder = save(tmp_path / "checkpoints", 1, tree={"random": random_states()})
    expected = draw()
    assert draw() != expected
    set_random_states(SavedState.of(folder, 0).own("random"))
    assert draw() == expected
    with pytest.raises(KeyError):
        SavedState.of(folder, 1).own("random")
