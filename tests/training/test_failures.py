"""When a rank fails, the last lines on the screen say which and why, and not that connections were lost."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from ringattn.training import failures
from ringattn.training.failures import PeerFailed, naming_first_failure, reported
from tests.training.forked import ROOT

LOST = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]")


@pytest.fixture
def store(monkeypatch) -> dist.HashStore:
    found = dist.HashStore()
    monkeypatch.setattr(failures, "_store", lambda: found)
    monkeypatch.setattr(failures, "PATIENCE", 0.2)
    return found


def fails(error: Exception, rank: int, monkeypatch) -> Exception:
    """What comes out of a rank that fails with `error`."""
    monkeypatch.setattr(dist, "get_rank", lambda: rank)

    @naming_first_failure
    def work() -> None:
        raise error

    with pytest.raises(Exception, match=r".") as raised:
        work()
    return raised.value


def test_who_lost_a_connection_names_the_first_to_fail(store, monkeypatch):
    fault = ArithmeticError("the fault")
    assert fails(fault, 3, monkeypatch) is fault
    assert fails(ValueError("a later one"), 2, monkeypatch).args == ("a later one",)
    for lost in (LOST, dist.DistBackendError("NCCL"), ConnectionResetError("reset")):
        found = fails(lost, 0, monkeypatch)
        assert isinstance(found, PeerFailed)
        assert str(found) == "rank 3 failed first: ArithmeticError: the fault"
        assert found.__cause__ is lost


def test_a_rank_that_was_killed_says_nothing(store, monkeypatch):
    assert "killed" in str(fails(LOST, 0, monkeypatch))
    wrapped = RuntimeError("a library's own words")
    wrapped.__cause__ = LOST
    assert "killed" in str(fails(wrapped, 1, monkeypatch))


def test_a_store_that_went_with_its_rank_hides_no_error(monkeypatch):
    def gone():
        raise dist.DistNetworkError("no store")

    monkeypatch.setattr(failures, "_store", gone)
    monkeypatch.setattr(failures, "PATIENCE", 0.2)
    fault = ArithmeticError("the fault")
    assert fails(fault, 3, monkeypatch) is fault
    assert isinstance(fails(LOST, 0, monkeypatch), PeerFailed)


def test_torchrun_is_told_the_message_alone(tmp_path, monkeypatch):
    def main() -> None:
        raise ArithmeticError("the fault")

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(ArithmeticError, match="the fault"):
        reported(main)()
    told = json.loads((tmp_path / "error.json").read_text())
    assert told["message"]["message"] == "ArithmeticError: the fault"


def test_the_end_of_torchruns_screen(tmp_path):
    """Rank 1 raises and rank 0 loses its connection in the same second: torchrun alone would name rank 0."""
    pytest.importorskip("transformers")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += ["tests/training/faulty.py", "1", f"run.output={tmp_path}", "data.seq_len=64", "run.steps=3"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "HYDRA_"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    last = done.stderr.splitlines()[-10:]
    assert any(re.fullmatch(r"\s*rank\s*: 1 \(local_rank: 1\)", line) for line in last), done.stderr
    assert any(line.endswith(": ArithmeticError: the fault of this test") for line in last), done.stderr
    assert "step 1/3" in done.stdout
    assert not Path(tmp_path, "checkpoints").exists()
