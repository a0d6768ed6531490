"""Tests of Triton kernels on the CPU: Triton reads TRITON_INTERPRET when it is imported, so they run in a process of
their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by a test that starts the interpreter")
starts_the_interpreter = pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")


def run_interpreted(file: str, passed: int) -> None:
    """Run the tests of a file that are `interpreted` by name, and check that so many passed."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", file, "-k", "interpreted"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CI": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert f" {passed} passed" in done.stdout, done.stdout[-500:]
