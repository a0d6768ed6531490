"""torchrun's end in a line: what ranks have said is not buried."""

import subprocess
import sys
from pathlib import Path

import pytest

from ringattn.commands._torchrun import ONE_MACHINE, one_machine


def ended(script: str, folder: Path) -> tuple[int, str]:
    """Exit code and stderr of two ranks."""
    path = folder / "ranks.py"
    path.write_text(script)
    command = [sys.executable, "-m", "ringattn.commands._agent", *ONE_MACHINE, "--nproc-per-node", "2", str(path)]
    with one_machine(command):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise SystemExit(int(rank) and 3)", "rank 1 (process {pid}) failed, with exit code 3: what it said is above"),
        ("int(rank) and os.kill(os.getpid(), signal.SIGKILL)", "rank 1 (process {pid}) was ended by SIGKILL"),
    ],
)
def test_the_first_failure_is_a_line_and_no_traceback(tmp_path: Path, code: str, words: str) -> None:
    note = f"open({str(tmp_path)!r} + '/pid' + rank, 'w').write(str(os.getpid()))"
    status, said = ended(f"import os, signal\nrank = os.environ['RANK']\n{note}\n{code}\n", tmp_path)
    assert status == 1
    assert f"ringattn: {words.format(pid=(tmp_path / 'pid1').read_text())}" in said
    assert "Traceback" not in said


def test_what_goes_well_is_not_told(tmp_path: Path) -> None:
    assert ended("pass\n", tmp_path)[0] == 0
