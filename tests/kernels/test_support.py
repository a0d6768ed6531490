"""docs/backends.md says what the capability records say."""

from pathlib import Path

import pytest
import torch

from ringattn.kernels.registry import builtin
from ringattn.kernels.spec import Capability
from ringattn.kernels.support import BEGIN, END, main, replaced, table

PAGE = Path(__file__).parents[2] / "docs" / "backends.md"


class Fake:
    name = "fake"
    capability = Capability(
        devices=("cuda",),
        dtypes=(torch.bfloat16,),
        max_head_dim=64,
        compute_capability=((8, 6), (9, 0)),
        window=False,
        dropout=True,
    )


def test_the_page_holds_the_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == replaced(text), "run: python -m ringattn.kernels.support docs/backends.md"


def test_every_backend_has_a_row_in_the_order_of_auto() -> None:
    rows = table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [backend.name for backend in builtin()]


def test_a_row_says_what_the_record_says() -> None:
    row = table([Fake()]).splitlines()[2]  # type: ignore[list-item]
    assert row == "| `fake` | CUDA 8.6 to below 9.0 | bf16 | ≤ 64 | – | – | ✓ | – | – | ✓ |"


def test_a_file_is_brought_up_to_date_and_the_rest_kept(tmp_path: Path) -> None:
    file = tmp_path / "R.md"
    file.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n", encoding="utf-8")
    assert main([str(file)]) == 0
    assert file.read_text(encoding="utf-8") == f"before\n\n{BEGIN}\n{table()}\n{END}\n\nafter\n"


def test_a_document_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="once each"):
        replaced(f"{END} {BEGIN}")
