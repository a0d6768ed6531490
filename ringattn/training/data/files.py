"""Which files the paths, folders and patterns of `data.files` stand for: each once, in the same order everywhere."""

import os
import stat
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from glob import glob, has_magic
from pathlib import Path


def matching_files(patterns: Sequence[str], own: Sequence[Path] = ()) -> list[Path]:
    """The files of some paths, folders or glob patterns (`**` stands for any folders), sorted by path.

    A file that several patterns or links lead to comes once. Links to folders are followed. Hidden files and folders
    (`.name`) are passed over below a folder or a wildcard, and taken where a pattern names them. So is what the run
    itself writes, below the folders `own`: it would be other data at the next start.

    Raises ValueError for a pattern that matches nothing, a link that leads nowhere and a folder that cannot be read.
    """
    found: dict[Path, Path] = {}
    for pattern in patterns:
        files = [path for path in sorted(_matches(pattern)) if not any(path.resolve().is_relative_to(f) for f in own)]
        if not files:
            raise ValueError(f"data.files: {pattern!r} matches no file")
        for path in files:
            real = path.resolve()
            found[real] = min(path, found.get(real, path))
    return sorted(found.values())


def _matches(pattern: str) -> Iterator[Path]:
    try:
        path = Path(pattern).expanduser()
    except RuntimeError as error:  # ~nobody
        raise ValueError(f"data.files: {pattern!r}: {error}") from None
    if path.is_dir():
        yield from _below(path)
    elif os.path.lexists(path):  # asked first: a[1].txt is a name and a pattern
        if not _is_file(path):
            raise ValueError(f"data.files: {pattern!r} is neither a file nor a folder")
        yield path
    elif "**" in path.parts:
        yield from _recursive(path)
    else:
        yield from (match for match in map(Path, glob(str(path))) if _is_file(match))


def _recursive(pattern: Path) -> Iterator[Path]:
    """The matches of a pattern with `**`; `glob` would go round in links that lead back up."""
    fixed = next(number for number, part in enumerate(pattern.parts) if has_magic(part))
    root, wanted = Path(*pattern.parts[:fixed]), pattern.parts[fixed:]
    if wanted[-1] == "**":
        wanted = (*wanted, "*")
    if root.is_dir():
        yield from (path for path in _below(root) if _fits(path.relative_to(root).parts, wanted))


def _fits(parts: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a pattern."""
    if not wanted:
        return not parts
    if wanted[0] == "**":
        return any(_fits(parts[skipped:], wanted[1:]) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], wanted[0]) and _fits(parts[1:], wanted[1:])


def _below(root: Path) -> Iterator[Path]:
    """The files below a folder; each folder is entered once, however many links lead to it."""
    entered: set[tuple[int, int]] = set()
    for folder, inside, files in os.walk(root, followlinks=True, onerror=_unreadable):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in entered:
            inside.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        shown = (Path(folder, name) for name in files if not name.startswith("."))
        yield from (path for path in shown if _is_file(path))


def _unreadable(error: OSError) -> None:
    raise ValueError(f"data.files: {error.filename!r} cannot be read: {error.strerror}")


def _is_file(path: Path) -> bool:
    """Whether it is a regular file; a link to nothing is an error, or its documents would be missing unnoticed."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        raise ValueError(f"data.files: {str(path)!r} cannot be read: {error.strerror}") from None
