"""Saves now and in a thread: what they hold, whom they wait for, and what becomes of those that fail."""

import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef

from ringattn.memory.host import HostMemory
from ringattn.training.checkpoint import Place, SavedState, SaveFailed, Saves, TrainState, folders, host_copy, writing
from ringattn.training.checkpoint.folders import complete_checkpoints
from ringattn.training.checkpoint.host_copy import HostCopy
from ringattn.training.checkpoint.snapshot import snapshot_of
from ringattn.training.health.incidents import read_incidents
from tests.pool import Pools
from tests.training.checkpoint.late import LateStream


@pytest.fixture
def saves(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Saves]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    made = Saves(tmp_path, getattr(request, "param", False), limit=2, device=torch.device("cpu"))
    yield made
    made.close()
    dist.destroy_process_group()


in_a_thread = pytest.mark.parametrize("saves", [True], indirect=True)
both_ways = pytest.mark.parametrize("saves", [False, True], indirect=True, ids=["now", "in a thread"])


def state(step: int) -> TrainState:
    return TrainState(step, 0, {}, "abc", "fsdp2", dist.get_world_size())


def failing(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    def write_part(folder: Path, rank: int, snapshot: Any, before: Any = writing.write_part) -> Any:
        if any(f"step-{step:08d}" in str(folder) for step in steps):
            raise OSError(5, "Input/output error", "rank-00000.safetensors")
        return before(folder, rank, snapshot)

    monkeypatch.setattr(writing, "write_part", write_part)


def save_all(saves: Saves, steps: int, place: Place) -> None:
    for step in range(1, steps + 1):
        saves.save(state(step), {"a": torch.ones(3)}, [place])
    saves.wait()


@in_a_thread
def test_a_thread_writes_what_there_was_and_the_next_save_waits(saves, tmp_path, monkeypatch):
    """Tensors of every kind are copied: of columns, without numbers, without dimensions."""
    go, writes = threading.Event(), []

    def write_part(*given: Any, before: Any = writing.write_part) -> Any:
        writes.append(given[0].name)
        assert go.wait(30)
        return before(*given)

    monkeypatch.setattr(writing, "write_part", write_part)
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "none": torch.zeros(0, 4), "one": torch.tensor(5)}
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    saves.save(state(1), tensors, [Place(tmp_path / "x", 3)])
    for tensor in tensors.values():
        tensor.add_(100)
    assert complete_checkpoints(tmp_path / "x") == []
    threading.Timer(0.3, go.set).start()
    saves.save(state(2), tensors, [Place(tmp_path / "x", 3)])
    assert [path.name for path in complete_checkpoints(tmp_path / "x")] == ["step-00000001"]
    saves.finish()
    for step, there in ((1, expected), (2, tensors)):
        found = SavedState.of(tmp_path / "x" / f"step-{step:08d}", 0)
        for name, tensor in there.items():
            assert torch.equal(found.own(name), tensor)
    assert writes == ["step-00000001.partial", "step-00000002.partial"]


@in_a_thread
def test_a_save_returns_before_the_copy_and_is_written_after_it(saves, tmp_path, monkeypatch):
    told: list[str] = []
    saves._copy._stream = stream = LateStream(told)

    def write_part(*given: Any, before: Any = writing.write_part) -> Any:
        told.append("written")
        return before(*given)

    monkeypatch.setattr(writing, "write_part", write_part)
    weights, place = torch.arange(6.0), Place(tmp_path / "x", 1)
    saves.save(state(1), {"a": weights}, [place])
    told.append("returned")
    assert stream.awaited.wait(30)  # by the thread
    saves.hold()
    weights.add_(100)
    saves.finish()
    assert told == ["returned", "copied", "written"]
    assert torch.equal(SavedState.of(place.folder(1), 0).own("a"), torch.arange(6.0))


@in_a_thread
def test_memory_that_is_copied_is_held_until_it_is(saves, tmp_path):
    class Stream(LateStream):
        def begin(self, copies: Any) -> None:
            assert len(list(copies)) == 1
            super().begin(())  # it keeps none of them

    saves._copy._stream = stream = Stream([])
    weights = torch.ones(6)
    storage = StorageWeakRef(weights.untyped_storage())
    saves.save(state(1), {"a": weights}, [Place(tmp_path / "x", 1)])
    del weights
    assert not storage.expired()
    stream.arrive()
    saves.finish()
    assert storage.expired()


def test_what_is_on_the_host_beside_a_gpu_is_copied_at_once():
    copy, tensors = HostCopy(torch.device("cpu")), {"a": torch.arange(3.0)}
    copy.of(snapshot_of(tensors))  # takes the memory, which is not to be locked
    copy._device, copy._stream = torch.device("cuda"), LateStream([])
    tensors["a"].add_(1)
    assert torch.equal(copy.of(snapshot_of(tensors)).tensors["a"], torch.arange(1.0, 4.0))


class FailingStream(LateStream):
    def wait(self) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure\nFor debugging consider")


@in_a_thread
def test_a_copy_that_failed_is_a_save_that_failed(saves, tmp_path, capsys):
    saves._copy._stream = FailingStream([])
    places = [Place(tmp_path / kind, 1, kind=kind) for kind in ("copy in memory", "checkpoint")]
    saves.save(state(1), {"a": torch.ones(3)}, places)
    reason = "rank 0: the copy to host memory failed: CUDA error: unspecified launch failure"
    with pytest.raises(SaveFailed, match=f"the last checkpoint was not saved: {reason}$"):
        saves.finish()
    assert [one["place"] for one in read_incidents(tmp_path)] == ["copy in memory", "checkpoint"]
    assert not any(place.root.exists() for place in places)
    assert capsys.readouterr().err.count(f"could not be saved: {reason} (failure 1") == 2


@both_ways
def test_one_failure_is_a_warning_and_the_next_success_forgets_it(saves, tmp_path, monkeypatch, capsys):
    failing(monkeypatch, 2, 4)
    place = Place(tmp_path / "x", 1)
    for step in range(1, 6):
        saves.save(state(step), {"a": torch.ones(3)}, [place])
    saves.finish()
    assert [path.name for path in complete_checkpoints(place.root)] == ["step-00000005"]
    told = capsys.readouterr().err
    assert "warning: the checkpoint of step 2 could not be saved: rank 0: Input/output error: rank-0" in told
    assert told.count("warning") == 2
    assert [one["step"] for one in read_incidents(tmp_path)] == [2, 4]
    assert {one["kind"] for one in read_incidents(tmp_path)} == {"failed-save"}


@both_ways
def test_as_many_in_a_row_as_are_allowed_stop_the_run(saves, tmp_path, monkeypatch):
    failing(monkeypatch, 2, 3)
    place = Place(tmp_path / "x", 1)
    with pytest.raises(SaveFailed, match=r"2 saves of a checkpoint failed in a row.*run\.max_failed_saves.*Input"):
        save_all(saves, 4, place)
    assert [path.name for path in place.root.iterdir()] == ["step-00000001"]


@both_ways
def test_the_last_one_must_succeed(saves, tmp_path, monkeypatch):
    failing(monkeypatch, 2)
    for step in (1, 2):
        saves.save(state(step), {"a": torch.ones(3)}, [Place(tmp_path / "x", 1)])
    with pytest.raises(SaveFailed, match=r"the last checkpoint was not saved: rank 0: Input/output error"):
        saves.finish()


@both_ways
def test_a_mistake_is_raised_and_is_no_failed_save(saves, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "write_part", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_all(saves, 1, Place(tmp_path / "x", 1))
    assert read_incidents(tmp_path) == []


@in_a_thread
def test_without_memory_for_a_copy_the_training_waits(saves, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(host_copy, "host_memory", lambda: HostMemory(2**30, 10, None))
    saves.save(state(1), {"a": torch.ones(30)}, [Place(tmp_path / "x", 1)])
    assert [path.name for path in complete_checkpoints(tmp_path / "x")] == ["step-00000001"]
    assert "of host memory are needed for a copy" in capsys.readouterr().err


def rank_1_fails(output: Path, asynchronous: bool) -> tuple[str, list[str], list[str]]:
    """What each rank hears of a disk that failed for rank 1."""
    made = Saves(output, asynchronous, 1, torch.device("cpu"))
    before = writing.write_part

    def write_part(folder: Path, rank: int, snapshot: Any) -> Any:
        if rank == 1 and "step-00000002" in str(folder):
            raise OSError(28, "No space left on device")
        return before(folder, rank, snapshot)

    writing.write_part = write_part
    try:
        for step in (1, 2):
            made.save(state(step), {"a": torch.ones(3)}, [Place(output / "x", 1)])
        made.wait()
    except SaveFailed as error:
        said = str(error)
    finally:
        writing.write_part = before
        made.close()
    dist.barrier()  # rank 0 takes away what was written in part
    return said, [path.name for path in (output / "x").iterdir()], [one["kind"] for one in read_incidents(output)]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_all_ranks_agree_that_a_save_failed(pool: Pools, tmp_path: Path, asynchronous: bool) -> None:
    for said, names, kinds in pool(2).run(rank_1_fails, tmp_path, asynchronous):
        assert said.endswith("the last one: rank 1: No space left on device")
        assert names == ["step-00000001"]
        assert kinds == ["failed-save"]


def copy_of_rank_1_fails(output: Path) -> str:
    """What each rank hears of it; rank 0 makes no copy at all."""
    made = Saves(output, dist.get_rank() == 1, 1, torch.device("cpu"))
    if made._copy is not None:
        made._copy._stream = FailingStream([])
    try:
        made.save(state(1), {"a": torch.ones(3)}, [Place(output / "x", 1)])
        made.wait()
    except SaveFailed as error:
        return str(error)
    finally:
        made.close()
    return ""


def test_all_ranks_agree_that_a_copy_failed(pool: Pools, tmp_path: Path) -> None:
    for said in pool(2).run(copy_of_rank_1_fails, tmp_path):
        assert said.endswith(
            "the last one: rank 1: the copy to host memory failed: CUDA error: unspecified launch failure"
        )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_full_keeps_the_good_one(saves, small_disk, monkeypatch, capsys):
    """Also where it said before that there was room: others write on it, too."""
    usage = folders.shutil.disk_usage(small_disk)
    monkeypatch.setattr(folders, "_ASIDE", 1000)
    place = Place(small_disk / "x", 1)
    saves.save(state(1), {"a": torch.ones(100_000)}, [place])
    saves.save(state(2), {"a": torch.ones(200_000)}, [place])
    assert "step-00000002 needs 0.8 MiB and 0.6 MiB are free in " in capsys.readouterr().err
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SaveFailed, match="No space left on device"):
        saves.save(state(3), {"a": torch.ones(200_000)}, [place])
    assert [path.name for path in place.root.iterdir()] == ["step-00000001"]


def test_a_disk_that_became_read_only(saves, small_disk, capsys):
    place = Place(small_disk / "x", 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    saves.save(state(1), {"a": torch.ones(10)}, [place])
    assert f"rank 0: Read-only file system: {small_disk / 'x'}" in capsys.readouterr().err


DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.float64]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 40), st.booleans()), max_size=6), st.integers(1, 9))
def test_large_tensors_are_copied_in_pieces(drawn, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_copy, "_PIECE", 64)
        patch.setattr(host_copy, "_MOST", most)
        pairs = []
        for dtype, rows, flipped in drawn:
            source = torch.arange(rows * 3).to(dtype).view(rows, 3)
            source = source.mT if flipped else source
            pairs.append((torch.full(source.shape, -1).to(dtype), source))
        parts = list(host_copy.pieces(pairs))
        limit = max(64, sum(source.nbytes for _, source in pairs) // most)
        for to, part in parts:
            assert part.nbytes <= limit or any(source is part and not part.is_contiguous() for _, source in pairs)
            to.copy_(part)
        assert len(parts) <= 2 * most + 2 * len(pairs) + 1
        for target, source in pairs:
            assert torch.equal(target, source)
