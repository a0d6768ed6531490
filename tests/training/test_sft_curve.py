"""`recipe=sft` learns what TRL's SFTTrainer learns of the same chats, on any number of ranks."""

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("trl")

from tests.training.sft_curve import STEPS, TEMPLATES, apart, batches_of, by_recipe, by_trl, write_chats


@pytest.mark.slow
@pytest.mark.parametrize(
    "template", [pytest.param(one, marks=[] if one == "qwen3" else pytest.mark.nightly) for one in TEMPLATES]
)
def test_the_curve_is_that_of_trl(template: str, tmp_path: Path) -> None:
    write_chats(tmp_path, template)
    expected = by_trl(tmp_path, batches_of(tmp_path))
    assert len(expected) == STEPS
    assert expected[-1] < 0.8 * expected[0]
    found = by_recipe(tmp_path, 1)
    assert apart(found, expected) < 1e-4
    for ranks in (2, 4):
        assert apart(by_recipe(tmp_path, ranks), found) < 1e-5
