"""The tables of options as Markdown."""

from ringattn.hf.options.option import Option, Table
from ringattn.hf.options.sft import SFT
from ringattn.hf.options.trainer import ARGUMENTS, METHODS
from ringattn.hf.options.training import ACCELERATOR, TRAINING

HEAD = """# Options of `SequenceTrainer` and `OnMesh`: tested, inert, refused

Made by `python -m ringattn.hf.options docs/trainer-options.md` from the tables that the refusals are made from
(`ringattn/hf/options/`); not to be edited.

*Tested*: runs on ranks and is compared with one process, by the test that is named (under `tests/hf/`). *Inert*: does
what it does without a mesh, for the reason that is given. *Refused*: `NotImplementedError` with its name when the
Trainer is made, before anything is read or sent. Options of a newer version that are in no table are refused unless
they have their default.
"""
SECTIONS: tuple[tuple[str, Table], ...] = (
    ("Arguments of the Trainer", ARGUMENTS),
    ("Methods", METHODS),
    ("`TrainingArguments`", TRAINING),
    ("`accelerator_config`", ACCELERATOR),
    ("`SFTConfig` of TRL, beside these", SFT),
)


def document() -> str:
    return "\n".join([HEAD, *("\n".join(_section(title, table)) for title, table in SECTIONS)])


def _section(title: str, table: Table) -> list[str]:
    rows = [f"| `{name}` | {option.state} | {_told(option)} |" for name, option in sorted(table.items())]
    return [f"## {title}", "", "| option | state | |", "| --- | --- | --- |", *rows, ""]


def _told(option: Option) -> str:
    parts = [f"`{option.tested}`" if option.tested else "", option.inert, option.note]
    if option.refusal is not None:
        which = f"refused {option.refusal.values}: " if option.refusal.values and option.state != "refused" else ""
        parts.append(which + option.refusal.why)
    return "; ".join(part for part in parts if part)
