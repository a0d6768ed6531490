"""What saving takes beside the training is known, and refused, before a run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from ringattn.memory.host import HostMemory
from ringattn.memory.settings import StateSettings
from ringattn.training.checkpoint import memory_copies
from ringattn.training.checkpoint.memory_copies import is_memory
from ringattn.training.memory_plan import limits_of
from ringattn.training.model.lora import lora_of
from ringattn.training.model.models import empty_model
from ringattn.training.resuming import save_plan
from ringattn.training.resuming.save_plan import machine_bytes, reserved_host, settle_saving
from ringattn.training.start.launched import Launch
from tests.training.recipe import prepared


def model_of(job: Any) -> nn.Module:
    return empty_model(job.model_config, lora_of(job.cfg.model))


def launch_of(ranks: int, each: int) -> Launch:
    return Launch("torchrun", 0, ranks, 0, each, "127.0.0.1", 0)


def test_a_machine_saves_weights_and_moments_of_its_ranks(tmp_path):
    job = prepared(f"run.output={tmp_path}")
    empty = model_of(job)
    count = sum(parameter.numel() for parameter in empty.parameters())
    assert machine_bytes(job.cfg, empty, StateSettings(), launch_of(8, 8)) == 12 * count
    assert machine_bytes(job.cfg, empty, StateSettings(), launch_of(8, 4)) == 6 * count
    small = machine_bytes(job.cfg, empty, StateSettings(weights="bfloat16", moments="bfloat16"), launch_of(8, 8))
    assert small == 6 * count
    eight = machine_bytes(job.cfg, empty, StateSettings(moments="int8"), launch_of(8, 8))
    assert 6 * count < eight < 12 * count  # of embeddings they stay wide


@pytest.mark.slow
def test_the_sizes_are_those_of_the_files(tmp_path):
    """What the plan says is what a run writes, but for its index."""
    from tests.training.test_runs import SMALL, run

    run(tmp_path, 1, "run.steps=1")
    job = prepared(*SMALL, f"run.output={tmp_path / 'other'}", "run.steps=1")
    planned = machine_bytes(job.cfg, model_of(job), StateSettings(), launch_of(1, 1))
    written = (tmp_path / "checkpoints" / "step-00000001" / "rank-00000.safetensors").stat().st_size
    assert planned < written < planned + 60_000


def test_what_is_asked_for_is_taken_from_the_host(tmp_path):
    job = prepared(f"run.output={tmp_path}", "memory.host_memory=64")
    empty, launch = model_of(job), launch_of(2, 2)
    size = machine_bytes(job.cfg, empty, StateSettings(), launch)
    found = {}
    for asked in ("auto", True):
        for every in (0, 5):
            job.cfg.run.async_save, job.cfg.run.memory_every = asked, every
            job.cfg.run.memory_folder = "/dev/shm"
            found[asked, every] = reserved_host(job.cfg, empty, launch) / size
    expected = 2 if is_memory(Path("/dev/shm")) else 0
    assert found == {("auto", 0): 0, ("auto", 5): expected, (True, 0): 1, (True, 5): 1 + expected}
    whole, less = (limits_of(job.cfg, launch, torch.device("cpu"), reserved).host for reserved in (0, 2**30))
    assert whole is not None
    assert less == whole - 2**30


def test_saves_are_asynchronous_where_gpus_compute_and_there_is_room(tmp_path, monkeypatch):
    job = prepared(f"run.output={tmp_path}")
    job.cfg.run.async_save = "auto"
    empty, launch = model_of(job), launch_of(2, 2)
    size = machine_bytes(job.cfg, empty, StateSettings(), launch)

    def settled(device: str, available: int) -> bool:
        monkeypatch.setattr(save_plan, "host_memory", lambda: HostMemory(None, available, None))
        return settle_saving(job.cfg, empty, StateSettings(), launch, torch.device(device), tmp_path)

    assert settled("cuda", 2 * size)
    assert not settled("cuda", 2 * size - 1)
    assert not settled("cpu", 10 * size)
    job.cfg.run.async_save = True
    assert settled("cpu", 0)


def test_a_folder_without_room_for_two_copies_is_refused_with_numbers(tmp_path, monkeypatch):
    (tmp_path / "shm").mkdir()
    given = (f"run.output={tmp_path / 'run'}", "run.memory_every=5", f"run.memory_folder={tmp_path / 'shm'}")
    job = prepared(*given)
    size = machine_bytes(job.cfg, model_of(job), StateSettings(), launch_of(1, 1))
    usage = memory_copies.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(memory_copies.shutil, "disk_usage", lambda path: usage._replace(free=2 * size - 1))
    with pytest.raises(ValueError, match=r"run\.memory_every=5: .* are needed in .*shm .*2 copies of .* are free"):
        prepared(*given)
    # Copies of this run are replaced, so that they count as free.
    old = memory_copies.make_rank_folder(memory_copies.copies_folder(tmp_path / "shm", tmp_path / "run"), 0)
    (old / "copy").write_bytes(b"x")
    prepared(*given)
    with pytest.raises(ValueError, match=r"run\.memory_every=5: /no/folder is not a folder of this machine"):
        prepared(*given[:2], "run.memory_folder=/no/folder")


def test_what_one_machine_cannot_read_alone_is_refused(tmp_path):
    job = prepared(f"run.output={tmp_path}", f"run.memory_folder={tmp_path}", "run.memory_every=5")
    job.cfg.engine.name = "deepspeed"
    for stage, words in ((2, "use engine.zero_stage=3"), (3, None)):
        job.cfg.engine.zero_stage = stage
        empty = model_of(job)

        def settle(empty: nn.Module = empty) -> bool:
            return settle_saving(job.cfg, empty, StateSettings(), launch_of(4, 2), torch.device("cpu"), tmp_path)

        if words is None:
            settle()
        else:
            with pytest.raises(ValueError, match=words):
                settle()


def test_neighbours_that_are_not_there_are_refused(tmp_path):
    given = (f"run.output={tmp_path}", "run.memory_neighbours=true")
    with pytest.raises(ValueError, match=r"run\.memory_neighbours=true keeps copies in memory: set run\.memory_every"):
        prepared(*given)
    given += ("run.memory_every=5", f"run.memory_folder={tmp_path}")
    with pytest.raises(ValueError, match=r"run\.memory_neighbours=true: there is one machine, and nobody to keep"):
        prepared(*given)
    assert prepared(*given, "run.elastic=true").cfg.run.memory_neighbours
    assert memory_copies.copies_of(True) == 2 * memory_copies.copies_of(False)
