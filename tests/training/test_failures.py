"""When a rank fails, the last lines on the screen say which and why, and not that connections were lost."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ringattn.training.failures import reported
from tests.training.forked import ROOT


def test_torchrun_is_told_the_message_alone(tmp_path, monkeypatch):
    def main() -> None:
        raise ArithmeticError("the fault")

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(ArithmeticError, match="the fault"):
        reported(main)()
    told = json.loads((tmp_path / "error.json").read_text())
    assert told["message"]["message"] == "ArithmeticError: the fault"


def test_a_traceback_shows_no_secret():
    key = "hf_" + "aB3" * 10
    lines = [
        "import threading",
        "from ringattn.training.failures import reported",
        "def fails(where):",
        f"    raise RuntimeError(f'{{where}}: https://me:geheim@host and {key}')",
        "def main():",
        "    thread = threading.Thread(target=fails, args=('thread',))",
        "    thread.start()",
        "    thread.join()",
        "    fails('main')",
        "reported(main)()",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    for where in ("thread", "main"):
        assert f"RuntimeError: {where}: https://<redacted>@host and <redacted>\n" in done.stderr
    assert key not in done.stderr
    assert "geheim" not in done.stderr
    assert "in fails" in done.stderr, "the rest of it is there"


@pytest.mark.nightly
def test_the_end_of_torchruns_screen(tmp_path):
    """Rank 1 raises and rank 0 loses its connection in the same second: torchrun alone would name rank 0."""
    done = faulty("1", tmp_path)
    last = done.stderr.splitlines()[-10:]
    assert any(re.fullmatch(r"\s*rank\s*: 1 \(local_rank: 1\)", line) for line in last), done.stderr
    assert any(line.endswith(": ArithmeticError: the fault of this test") for line in last), done.stderr
    assert "step 1/3" in done.stdout
    assert not Path(tmp_path, "checkpoints").exists()


@pytest.mark.slow
def test_a_step_that_does_not_fit_says_so_at_the_end_of_the_screen(tmp_path):
    done = faulty("1:memory", tmp_path)
    said = "step 2 on rank 1, in its forward pass: the GPU's memory is full, 3.00 GiB more were wanted"
    assert any(line.endswith(f": OutOfMemoryError: {said}") for line in done.stderr.splitlines()[-10:]), done.stderr
    assert "step 1/3" in done.stdout


def faulty(fault, output):
    """The recipe on two ranks, which fails."""
    pytest.importorskip("transformers")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += ["tests/training/faulty.py", fault, f"run.output={output}", "data.seq_len=64", "run.steps=3"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "HYDRA_"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    return done
