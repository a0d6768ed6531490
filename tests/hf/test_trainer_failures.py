"""Who failed first, on the screen of somebody who started torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch.distributed import distributed_c10d

from tests.hf.trainer_runs import Rows, failure, mesh, trainer_of
from tests.pool import Pools

pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate (pip install 'ringattn[hf]')")

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
import torch.distributed as dist
from ringattn import init_mesh
from ringattn.hf.trainer import SequenceTrainer
from tests.hf.trainer_runs import Rows, arguments, collate, small_model

class Failing(SequenceTrainer):
    def compute_loss(self, model, inputs, *args, **keywords):
        if dist.get_rank() == 1 and self.state.global_step == 1:
            raise ValueError("no loss for this row")
        return super().compute_loss(model, inputs, *args, **keywords)

mesh = init_mesh(ring=2, device_type="cpu")
Failing(small_model(), arguments(sys.argv[1]), mesh=mesh, train_dataset=Rows(4), data_collator=collate).train()
"""


@pytest.mark.nightly
def test_the_first_rank_to_fail_speaks_last(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, str(tmp_path / "failing.py"), str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=170, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    told = done.stderr.partition("Root Cause (first observed failure):")[2]
    assert told, done.stderr[-3000:]
    last = [line for line in told.splitlines() if line.strip()][-2]
    assert "ValueError: no loss for this row" in last
    other = done.stderr.partition("FAILED\n")[2].partition("Root Cause")[0]
    if "Connection closed by peer" in other:  # where that rank was killed before it noticed it says so
        assert "rank 1 failed first: ValueError: no loss for this row" in other


def broken(folder: str) -> tuple[str, str]:
    """What a rank raises and records whose connection broke after another one had said why it failed."""
    from ringattn.first_failure import KEY

    trainer = trainer_of(mesh(1, 1), folder, eval_dataset=Rows(1))
    distributed_c10d._get_default_store().set(KEY, "rank 3 failed first: ValueError: no such row")

    def closed(*_: Any, **__: Any) -> None:
        raise RuntimeError("[gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:1")

    trainer.compute_loss = closed
    file = Path(folder, "error.json")
    with mock.patch.dict(os.environ, TORCHELASTIC_ERROR_FILE=str(file)):
        told = failure(trainer.evaluate)
    return told, json.loads(file.read_text())["message"]["extraInfo"]["py_callstack"]


def test_a_broken_connection_tells_who_failed(pool: Pools, tmp_path: Path) -> None:
    told, recorded = pool(1).run(broken, str(tmp_path))[0]
    expected = "PeerFailed: rank 3 failed first: ValueError: no such row"
    assert told == expected
    assert recorded.rstrip().endswith(expected)
