"""Paths, folders and patterns: every file once, and none missing without a word."""

import os
from pathlib import Path

import pytest

from ringattn.training.data.files import matching_files


def tree(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def found(root: Path, *patterns: str) -> list[str]:
    return [path.relative_to(root).as_posix() for path in matching_files([str(root / pattern) for pattern in patterns])]


def test_folders_and_patterns_find_files_in_order(tmp_path):
    tree(tmp_path, "a.txt", "b/c.txt", "b/d.md", "b/e/f.txt", "ü/日本.txt")
    assert found(tmp_path, "") == ["a.txt", "b/c.txt", "b/d.md", "b/e/f.txt", "ü/日本.txt"]
    assert found(tmp_path, "*.txt", "b/*") == ["a.txt", "b/c.txt", "b/d.md"]
    assert found(tmp_path, "**/*.txt") == ["a.txt", "b/c.txt", "b/e/f.txt", "ü/日本.txt"]
    assert found(tmp_path, "b/**") == ["b/c.txt", "b/d.md", "b/e/f.txt"]
    assert found(tmp_path, "**/e/*.t[xy]t") == ["b/e/f.txt"]
    assert found(tmp_path, "?/c.txt") == ["b/c.txt"]


def test_hidden_files_are_passed_over_unless_they_are_named(tmp_path):
    tree(tmp_path, "a.txt", ".hidden", ".git/config", "b/.DS_Store", "b/c.txt")
    assert found(tmp_path, "") == found(tmp_path, "**/*") == ["a.txt", "b/c.txt"]
    assert found(tmp_path, "*", "b/*") == ["a.txt", "b/c.txt"]
    assert found(tmp_path, ".hidden", ".git/*") == [".git/config", ".hidden"]


def test_links_that_go_round_end(tmp_path):
    """Two links upwards in one folder: a walk that followed each of them would have 2^40 paths."""
    tree(tmp_path, "a.txt", "b/c.txt")
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "b" / "here").symlink_to(tmp_path / "b")
    assert len(found(tmp_path, "")) == len(found(tmp_path, "**/*.txt")) == 2


def test_a_file_is_one_document_whatever_leads_to_it(tmp_path):
    tree(tmp_path, "a.txt", "b/c.txt")
    (tmp_path / "again.txt").symlink_to(tmp_path / "a.txt")
    (tmp_path / "b" / "more").symlink_to(tmp_path / "b")
    assert found(tmp_path, "", "a.txt", "*.txt", "b/../a.txt") == ["a.txt", "b/c.txt"]


def test_linked_folders_are_read(tmp_path):
    tree(tmp_path / "elsewhere", "c.txt")
    tree(tmp_path / "data", "a.txt")
    (tmp_path / "data" / "part").symlink_to(tmp_path / "elsewhere")
    assert found(tmp_path / "data", "") == ["a.txt", "part/c.txt"]
    assert found(tmp_path / "data", "**/*.txt") == ["a.txt", "part/c.txt"]


def test_a_name_that_looks_like_a_pattern(tmp_path):
    tree(tmp_path, "a[1].txt", "a1.txt", "what?.txt")
    assert found(tmp_path, "a[1].txt") == ["a[1].txt"]
    assert found(tmp_path, "what?.txt") == ["what?.txt"]


@pytest.mark.parametrize("pattern", ["nothing*", "nothing", "nothing/**/*.txt", "empty", ".hidden*"])
def test_a_pattern_that_matches_nothing_is_named(pattern, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"data\.files: '.*' matches no file") as error:
        found(tmp_path, pattern)
    assert pattern in str(error.value)


@pytest.mark.parametrize("pattern", ["gone.txt", "round.txt", "*.txt", "**/*.txt", ""])
def test_a_link_to_nothing_is_no_missing_document(pattern, tmp_path):
    tree(tmp_path, "a.txt")
    (tmp_path / ("round.txt" if pattern == "round.txt" else "gone.txt")).symlink_to("round.txt")
    with pytest.raises(ValueError, match=r"data\.files: .*(gone|round)\.txt' cannot be read"):
        found(tmp_path, pattern)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    tree(tmp_path, "a.txt")
    with pytest.raises(ValueError, match="pipe' is neither a file nor a folder"):
        found(tmp_path, "pipe")
    assert found(tmp_path, "") == ["a.txt"]
    with pytest.raises(ValueError, match=r"data\.files: '~nobody-at-all/x'"):
        matching_files(["~nobody-at-all/x"])


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    tree(tmp_path, "a.txt", "b/c.txt")
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(ValueError, match=r"data\.files: '.*/b' cannot be read: Permission denied"):
        found(tmp_path, "")
