"""Every option of transformers' Trainer and TRL's SFTTrainer on a sequence mesh: tested, inert, or refused.

The tables are what refusals are made from, and `docs/trainer-options.md` (`python -m ringattn.hf.options FILE`).
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from ringattn.hf.options.option import Option, Refusal, Table, check_values, unknown_fields
from ringattn.hf.options.sft import SFT
from ringattn.hf.options.trainer import ARGUMENTS, METHODS
from ringattn.hf.options.training import ACCELERATOR, TRAINING

__all__ = ["ACCELERATOR", "ARGUMENTS", "METHODS", "SFT", "TRAINING", "Option", "Refusal", "Table", "check_arguments",
           "check_trainer"]  # fmt: skip


def check_arguments(arguments: Any) -> None:
    """Raises NotImplementedError for an option of TrainingArguments or SFTConfig that is refused, or not known yet."""
    check_values(arguments, TRAINING | SFT)
    check_values(getattr(arguments, "accelerator_config", None), ACCELERATOR, "accelerator_config.")
    defaults = {field.name: field for field in fields(arguments)}
    for name in unknown_fields(arguments, TRAINING | SFT):
        default = defaults[name].default
        if default is not MISSING and getattr(arguments, name) != default:
            raise NotImplementedError(
                f"{name}={getattr(arguments, name)!r}: this option is newer than what has been tried on a sequence "
                f"mesh; leave it {default!r}"
            )


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Raises NotImplementedError for an argument or attribute of a Trainer that is refused."""
    check_values(trainer, ARGUMENTS)
