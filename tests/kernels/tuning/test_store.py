"""The file of measured results survives many writers, broken contents and folders that cannot be written."""

import multiprocessing
import warnings
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from ringattn.kernels.tuning.store import SCHEMA, Store, default_folder

FAST = {"tile": 1}


def write_keys(folder: str, process: int, barrier: Barrier) -> None:
    store = Store(Path(folder))
    barrier.wait()
    for i in range(5):
        store.write(f"{process}-{i}", {"choice": {"process": process}})


def test_eight_processes_write_eight_keys(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(8)
    writers = [context.Process(target=write_keys, args=(str(tmp_path / "new"), i, barrier)) for i in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    store = Store(tmp_path / "new")
    assert all(
        store.read(f"{process}-{i}") == {"choice": {"process": process}} for process in range(8) for i in range(5)
    )
    assert sorted(path.name for path in store.folder.iterdir()) == [f"tuning-{SCHEMA}.json", f"tuning-{SCHEMA}.lock"]


@pytest.mark.parametrize(
    "content",
    [b'{"schema": 1, "entr', b"", b"\xff\xfe", b"[]", b'{"schema": 99, "entries": {}}', b'{"schema": 1, "entries": 3}'],
)
def test_a_broken_file_is_ignored_with_one_warning_and_healed(tmp_path: Path, content: bytes) -> None:
    store = Store(tmp_path)
    store.path.write_bytes(content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert store.read("a") is None
        assert store.read("b") is None
        assert store.write("a", {"choice": FAST})
    assert ["ignoring" in str(warning.message) for warning in caught] == [True]
    assert Store(tmp_path).read("a") == {"choice": FAST}


def test_the_folder_is_the_chosen_one_then_xdg_then_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RINGATTN_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_folder() == tmp_path / "home/.cache/ringattn"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg/ringattn"
    monkeypatch.setenv("RINGATTN_CACHE_DIR", str(tmp_path / "own"))
    assert default_folder() == tmp_path / "own"
