"""A folder holds one run at a time, and a lock that a crash leaves behind is none."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ringattn.training.health import lock
from ringattn.training.health.lock import is_free, take


def test_the_second_is_refused_and_hears_who_is_there(tmp_path: Path) -> None:
    assert is_free(tmp_path)
    first, note = take(tmp_path)
    assert note == ""
    assert not is_free(tmp_path)
    with pytest.raises(ValueError, match=rf"run.output={tmp_path} is in use by another run: process {os.getpid()} on "):
        take(tmp_path, 0.0)
    first.release()
    first.release()
    assert is_free(tmp_path)
    take(tmp_path, 0.0)[0].release()


def test_it_ends_with_the_last_process_that_holds_it(tmp_path: Path) -> None:
    """As a monitor does after the death of rank 0."""
    first, _ = take(tmp_path)
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[first.descriptor])
    first.release()
    assert not is_free(tmp_path)
    other.send_signal(signal.SIGKILL)
    other.wait()
    take(tmp_path, 5.0)[0].release()


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    none, note = take(tmp_path)
    assert none.descriptor == -1
    assert note.endswith(".lock: Operation not supported: two runs in this folder at once would not be noticed")
    assert is_free(tmp_path)
    none.release()


def test_a_file_that_says_nothing_of_its_holder(tmp_path: Path) -> None:
    first, _ = take(tmp_path)
    (tmp_path / ".lock").write_text("{")
    with pytest.raises(ValueError, match="it did not say who it is"):
        take(tmp_path, 0.0)
    first.release()
