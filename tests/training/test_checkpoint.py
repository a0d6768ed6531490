"""Checkpoints are complete or absent, wherever a process dies."""

import os
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ringattn.training import checkpoint
from ringattn.training.checkpoint import (
    TrainState,
    complete_checkpoints,
    load_random_states,
    newest_checkpoint,
    save_checkpoint,
)


@pytest.fixture(autouse=True)
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def state(step: int) -> TrainState:
    return TrainState(step, 10 * step, {"epoch": 0, "index": step, "offset": 3}, "abc", "fsdp2", 1)


def write(folder):
    (folder / "weights").write_text("w")


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_the_newest_checkpoints_are_found_and_kept(tmp_path):
    root = tmp_path / "checkpoints"
    assert newest_checkpoint(root) is None
    for step in (5, 10, 100, 15):
        save_checkpoint(root, state(step), write, keep=2)
    found = newest_checkpoint(root)
    assert found is not None
    assert found[1] == state(100)
    assert names(root) == ["step-00000015", "step-00000100"]


@pytest.mark.parametrize("moment", ["write", "marker", "rename"])
def test_death_while_saving_leaves_the_one_before(tmp_path, monkeypatch, moment):
    root = tmp_path / "checkpoints"
    save_checkpoint(root, state(5), write, keep=1)

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "marker":
            patch.setattr(checkpoint.json, "dump", die)
        elif moment == "rename":
            patch.setattr(os, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(root, state(10), die if moment == "write" else write, keep=1)
    assert newest_checkpoint(root) == (root / "step-00000005", state(5))
    assert names(root) == ["step-00000005", "step-00000010.partial"]
    save_checkpoint(root, state(10), write, keep=1)
    assert names(root) == ["step-00000010"]


def test_death_while_deleting_the_old_one(tmp_path, monkeypatch):
    root = tmp_path / "checkpoints"
    save_checkpoint(root, state(5), write, keep=1)

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(root, state(10), write, keep=1)
    assert [path.name for path in complete_checkpoints(root)] == ["step-00000010"]


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    root = tmp_path / "checkpoints"
    save_checkpoint(root, state(5), write, keep=2)
    save_checkpoint(root, state(5), lambda folder: pytest.fail("written again"), keep=2)


def test_a_folder_without_marker_is_not_complete(tmp_path):
    root = tmp_path / "checkpoints"
    (root / "step-00000007").mkdir(parents=True)
    assert newest_checkpoint(root) is None
    save_checkpoint(root, state(7), write, keep=2)
    assert newest_checkpoint(root) == (root / "step-00000007", state(7))


def test_random_states_come_back(tmp_path):
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), torch.rand(()).item()  # noqa: NPY002

    folder = save_checkpoint(tmp_path / "checkpoints", state(1), write, keep=1)
    expected = draw()
    assert draw() != expected
    assert load_random_states(folder)
    assert draw() == expected
    (folder / "random-00000.pt").unlink()
    assert not load_random_states(folder)
