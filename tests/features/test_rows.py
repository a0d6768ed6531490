"""Every row of FEATURES A.1, A.2, A.3, A.5 and A.6 has a test of its own in this folder."""

import re
from pathlib import Path

import pytest

SECTIONS = {
    "A.1 selection": range(1, 12),
    "A.2 negotiation": range(12, 17),
    "A.3 windows": range(17, 27),
    "A.5 numerics": range(40, 56),
    "A.6 operations": range(56, 77),
}
TEST = re.compile(r"^def (test_\w+)", re.MULTILINE)
ROW = re.compile(r"test_row_(\d\d)_\w{8,}")


def names() -> list[str]:
    files = [path for path in sorted(Path(__file__).parent.glob("test_*.py")) if path != Path(__file__)]
    return [name for path in files for name in TEST.findall(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_row_of_a_section_has_a_test(section: str) -> None:
    covered = {int(match.group(1)) for match in map(ROW.fullmatch, names()) if match}
    assert sorted(set(SECTIONS[section]) - covered) == []


def test_every_test_of_the_folder_names_a_row() -> None:
    rows = {row for section in SECTIONS.values() for row in section}
    wrong = [name for name in names() if not (match := ROW.fullmatch(name)) or int(match.group(1)) not in rows]
    assert wrong == []
