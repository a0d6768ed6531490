"""Measured results on disk: one JSON file that many processes may write at once and that may be missing or broken."""

import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ringattn.environment import CACHE_DIR

SCHEMA = 1  # of the file and of the keys; another schema is another file


def default_folder() -> Path:
    """RINGATTN_CACHE_DIR, else `ringattn` in XDG_CACHE_HOME or ~/.cache."""
    chosen = CACHE_DIR.read()
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "ringattn"


class Store:
    """Entries by key. Nothing is created before the first write; no failure of the disk is more than one warning."""

    def __init__(self, folder: Path | None = None, kind: str = "tuning") -> None:
        self.folder = default_folder() if folder is None else folder
        self.kind = kind
        self.path = self.folder / f"{kind}-{SCHEMA}.json"
        self._warned: set[str] = set()

    def read(self, key: str) -> dict[str, Any] | None:
        return self._entries().get(key)

    def write(self, key: str, entry: dict[str, Any]) -> bool:
        """Add an entry beside those that other processes wrote meanwhile; False if the folder cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._replace({**self._entries(), key: entry})
        except OSError as error:
            self._warn(
                f"cannot keep {self.kind} results in {self.folder}, measuring again in the next process: {error}"
            )
            return False
        return True

    def _entries(self) -> dict[str, dict[str, Any]]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError) as error:  # ValueError: truncated, not JSON, or not UTF-8
            self._warn(f"ignoring {self.path}, which cannot be read: {error}")
            return {}
        entries = content.get("entries") if isinstance(content, dict) and content.get("schema") == SCHEMA else None
        if not isinstance(entries, dict):
            self._warn(f"ignoring {self.path}, which is not a {self.kind} file of schema {SCHEMA}")
            return {}
        return {key: entry for key, entry in entries.items() if isinstance(entry, dict)}

    def _replace(self, entries: dict[str, dict[str, Any]]) -> None:
        """Write a whole new file and rename it: a reader sees the old one or the new one."""
        handle, name = tempfile.mkstemp(dir=self.folder, prefix=f".{self.kind}-", suffix=".json")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"schema": SCHEMA, "entries": entries}, file, indent=1, sort_keys=True)
            os.replace(name, self.path)
        except BaseException:
            os.unlink(name)
            raise

    @contextmanager
    def _locked(self) -> Iterator[None]:
        import fcntl

        with open(self.path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, also by a process that is killed
            yield

    def _warn(self, text: str) -> None:
        if text.partition(":")[0] not in self._warned:
            self._warned.add(text.partition(":")[0])
            warnings.warn(text, stacklevel=4)
