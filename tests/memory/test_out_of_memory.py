"""What is said when memory runs out, with errors and figures that are made up."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ringattn.first_failure import FirstFailure
from ringattn.memory.host import HostMemory
from ringattn.memory.offload import HostStack
from ringattn.memory.out_of_memory import Figures, MemoryWatch, asked_for, largest
from tests.pool import Pools

GIB = 2**30
TORCH = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.80 GiB."


def block(size: float, state: str = "active_allocated", *frames: dict[str, Any]) -> dict[str, Any]:
    return {"size": int(size * GIB), "requested_size": int(size * GIB), "state": state, "frames": list(frames)}


FRAMES = (
    {"filename": "??", "line": 0, "name": "malloc"},
    {"filename": "/env/torch/nn/functional.py", "line": 3, "name": "linear"},
    {"filename": "/home/me/model.py", "line": 12, "name": "forward"},
)
SNAPSHOT: dict[str, Any] = {
    "segments": [
        {"blocks": [block(4), block(4), block(8, "inactive"), block(1, "active_allocated", *FRAMES)]},
        {"blocks": [block(4), block(100, "active_awaiting_free"), block(0.5)]},
    ]
}


class Device:
    name = "cuda:3 (NVIDIA H200)"

    def __init__(self, allocated: float = 120.0, fails: bool = False, expandable: bool = False) -> None:
        self._figures = Figures(int(allocated * GIB), 134 * GIB, GIB // 2, 140 * GIB)
        self._fails, self._expandable = fails, expandable

    def figures(self) -> Figures:
        if self._fails:
            raise RuntimeError("CUDA error: the device is gone")
        return self._figures

    def snapshot(self) -> dict[str, Any]:
        return SNAPSHOT | {"allocator_settings": {"expandable_segments": self._expandable}}


def report(watch: MemoryWatch, error: BaseException, *steps: str) -> BaseException:
    try:
        with watch.step(12) as at:
            for step in steps:
                at(step)
            raise error
    except type(error) as said:
        return said


def test_the_report_of_a_full_gpu(tmp_path: Path) -> None:
    plan = {"logits": 2 * GIB, "layer inputs": 40 * GIB, "weights": 16 * GIB}
    watch = MemoryWatch(Device(), tmp_path / "run", 3, plan, lambda asked: f"something for {asked // GIB} GiB")
    error = torch.OutOfMemoryError(TORCH)
    said = report(watch, error, "forward pass", "backward pass")
    file = tmp_path / "run" / "out-of-memory-step12-rank3.pickle"
    assert str(said).split("\n  ") == [
        "step 12 on rank 3, in its backward pass: the GPU's memory is full, 20.00 GiB more were wanted",
        "cuda:3 (NVIDIA H200): 120.00 GiB of 140.00 GiB are in use by tensors, 14.00 GiB are held by torch's allocator "
        "without use, 5.50 GiB by others (libraries, programs), 0.50 GiB are free",
        "what has no use is in pieces: PYTORCH_ALLOC_CONF=expandable_segments:True in the environment joins them",
        "planned: 58.00 GiB in all, of it layer inputs 40.00 GiB, weights 16.00 GiB, logits 2.00 GiB; 62.00 GiB more "
        "than that are in use",
        "largest in use: 12.00 GiB in 3 of 4.00 GiB; 1.00 GiB in 1 of 1.00 GiB from model.py:12 forward; 0.50 GiB in 1 "
        "of 0.50 GiB",
        "to change next: something for 20 GiB",
        f"snapshot: {file} (for https://pytorch.org/memory_viz)",
    ]
    assert said.__cause__ is error
    assert pickle.loads(file.read_bytes())["segments"] == SNAPSHOT["segments"]


def test_what_is_unknown_is_left_out(tmp_path: Path) -> None:
    said = str(report(MemoryWatch(None, tmp_path), torch.OutOfMemoryError("full")))
    assert said == "step 12 on rank 0: the GPU's memory is full, full"
    assert "in pieces" not in str(report(MemoryWatch(Device(133), tmp_path), torch.OutOfMemoryError(TORCH)))
    joined = MemoryWatch(Device(expandable=True), tmp_path)
    assert "in pieces" not in str(report(joined, torch.OutOfMemoryError(TORCH)))


def test_a_report_that_fails_itself_says_what_it_can(tmp_path: Path) -> None:
    said = str(report(MemoryWatch(Device(fails=True), tmp_path), torch.OutOfMemoryError(TORCH)))
    assert "20.00 GiB more were wanted" in said
    assert "cuda:3 (NVIDIA H200) does not say how its memory stands: CUDA error: the device is gone" in said
    (tmp_path / "file").write_text("")
    said = str(report(MemoryWatch(Device(), tmp_path / "file" / "run"), torch.OutOfMemoryError(TORCH)))
    assert "the allocator's snapshot could not be written" in said


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory",
        "NCCL error: unhandled cuda error: Cuda failure 2 'out of memory'",
    ],
)
def test_libraries_that_find_no_memory_are_reported_alike(tmp_path: Path, message: str) -> None:
    watch = MemoryWatch(None, tmp_path)
    with pytest.raises(torch.OutOfMemoryError) as caught, watch.step(1):
        raise RuntimeError(message)
    assert str(caught.value) == f"step 1 on rank 0: the GPU's memory is full, {message}"


def test_a_full_host_is_reported_with_its_numbers(tmp_path: Path) -> None:
    watch = MemoryWatch(Device(), tmp_path, 1, host=lambda: HostMemory(64 * GIB, 3 * GIB, None))
    said = str(report(watch, MemoryError("host_bytes=10 are used up"), "forward pass"))
    assert said.split("\n  ")[:2] == [
        "step 12 on rank 1, in its forward pass: the host's memory is full, host_bytes=10 are used up",
        "3.0 GiB of 64.0 GiB host memory are available; at most all of it may be locked (ulimit -l)",
    ]
    assert "fewer memory.host_layers" in said
    with pytest.raises(MemoryError, match="can't allocate memory"), watch.step(1):
        torch.empty(2**55, dtype=torch.uint8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [RuntimeError("another fault"), ValueError("out of memory of names")])
def test_other_errors_pass(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, MemoryWatch(Device(), tmp_path).step(1):
        raise error
    assert caught.value is error


def test_nothing_is_looked_at_while_all_is_well(tmp_path: Path) -> None:
    with MemoryWatch(Device(fails=True), tmp_path).step(1) as at:
        at("forward pass")
    assert not list(tmp_path.iterdir())


def test_bytes_that_were_asked_for() -> None:
    assert asked_for(TORCH) == 20 * GIB
    assert asked_for("CUDA out of memory. Tried to allocate 2.50 MiB.") == 5 * 2**19
    assert asked_for("no number") == 0
    assert largest({}) == []


def first_to_fail(_: int) -> str:
    """A rank whose memory is full has not lost its connection, whoever noticed."""
    try:
        with FirstFailure():
            if dist.get_rank() == 1:
                raise torch.OutOfMemoryError("NCCL found no memory") from dist.DistBackendError("NCCL error")
    except torch.OutOfMemoryError:
        return "reported"
    return "well"


def test_a_full_rank_is_the_first_to_fail(pool: Pools) -> None:
    assert pool(2).run(first_to_fail, 0) == ["well", "reported"]


def test_host_memory_that_there_is_not_is_refused_before_it_is_taken() -> None:
    with pytest.raises(MemoryError, match=r"host_bytes=\d+ .* are more than there is: .*ulimit -l.*offload less"):
        HostStack(2**50, pinned=False)
