"""Tests of Triton kernels on the CPU: Triton reads TRITON_INTERPRET when it is imported, so they run in a process of
their own."""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CALL = "run_interpreted(__file__"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by a test that starts the interpreter")
starts_the_interpreter = pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")


def run_interpreted(file: str, passed: int) -> None:
    """Check that the tests of a file that are `interpreted` by name pass, and that there are so many."""
    pytest.importorskip("triton")
    output = _of_all_files()
    outcome = re.compile(rf"{re.escape(str(Path(file).relative_to(ROOT)))}::.* ([A-Z]{{4,}})\b.*")
    outcomes = [found[1] for line in output.splitlines() if (found := outcome.fullmatch(line))]
    assert outcomes == ["PASSED"] * passed, output[-5000:]


@cache
def _of_all_files() -> str:
    """One process for the files of this folder that call `run_interpreted`: its start takes longer than most tests."""
    files = [str(path) for path in sorted(Path(__file__).parent.rglob("test_*.py")) if CALL in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CI": "1", "COLUMNS": "300"}
    done = subprocess.run(
        [*command, *files, "-k", "interpreted"], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    return done.stdout + done.stderr[-2000:]
