"""The tables of options: nothing that is installed is missing, every test that they name exists, so does the page."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate (pip install 'ringattn[hf]')")

from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from ringattn.hf.options import ACCELERATOR, ARGUMENTS, METHODS, SFT, TRAINING, Table, check_arguments
from ringattn.hf.options.document import document

HERE = Path(__file__).parent
TABLES: dict[str, Table] = {
    "training": TRAINING,
    "accelerator": ACCELERATOR,
    "arguments": ARGUMENTS,
    "methods": METHODS,
    "sft": SFT,
}


def names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def parameters(kind: type) -> set[str]:
    return set(inspect.signature(kind).parameters) - {"self"}


def test_every_option_of_transformers_is_known() -> None:
    assert names(TrainingArguments) - set(TRAINING) == set()
    assert names(AcceleratorConfig) - set(ACCELERATOR) == set()
    assert parameters(Trainer) - set(ARGUMENTS) == set()


def test_every_option_of_trl_is_known() -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed (pip install 'ringattn[dev]')")
    assert names(trl.SFTConfig) - set(TRAINING) - set(SFT) == set()
    assert parameters(trl.SFTTrainer) - set(ARGUMENTS) == set()


@pytest.mark.parametrize("table", TABLES)
def test_every_option_has_a_test_or_a_reason(table: str) -> None:
    for name, option in TABLES[table].items():
        assert bool(option.tested) + bool(option.inert) <= 1, name
        assert option.tested or option.inert or option.refusal, name
        if option.tested:
            file, _, function = option.tested.partition("::")
            assert f"\ndef {function}(" in (HERE / file).read_text(), name


def test_the_document_is_made_from_the_tables() -> None:
    """python -m ringattn.hf.options docs/trainer-options.md"""
    assert (HERE.parents[1] / "docs" / "trainer-options.md").read_text() == document()


def newer(base: type, default: Any, value: Any, module: str = "transformers.training_args") -> Any:
    """Arguments of a class with one more option, as a later version may have."""
    kind = dataclasses.make_dataclass("Newer", [("sparkle", type(default), default)], bases=(base,))
    kind.__module__ = module
    return kind(output_dir="out", sparkle=value, report_to=[])


def test_options_of_newer_versions() -> None:
    """One that is not known is refused where it is used; one of the user's own class is his."""
    check_arguments(newer(TrainingArguments, 1.0, 1.0))
    check_arguments(newer(TrainingArguments, 1.0, 2.0, "mine"))
    with pytest.raises(NotImplementedError, match=r"sparkle=2\.0: this option is newer than"):
        check_arguments(newer(TrainingArguments, 1.0, 2.0))
