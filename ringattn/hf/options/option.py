"""An option of a Trainer, and what is known of it on a sequence mesh. Tables of these make refusals and documents."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from inspect import get_annotations
from typing import Any

Table = Mapping[str, "Option"]


@dataclass(frozen=True)
class Refusal:
    """Values that are refused.

    Arguments:
        values: which, in words.
        why: and what to do instead.
        when: tells from the value whether it is one of them.
    """

    values: str
    why: str
    when: Callable[[Any], bool] = bool


@dataclass(frozen=True)
class Option:
    """One option.

    Arguments:
        tested: the test that runs it on ranks and compares with one process, "file::function" under tests/hf; or
        inert: why it does what it does without a mesh.
        refusal: values that are refused; alone, nothing else of the option does anything here.
        note: what differs from the stock Trainer.
    """

    tested: str = ""
    inert: str = ""
    refusal: Refusal | None = None
    note: str = ""

    @property
    def state(self) -> str:
        return "tested" if self.tested else "inert" if self.inert else "refused"


def check_values(holder: Any, table: Table, prefix: str = "") -> None:
    """Raises NotImplementedError for the first attribute (or key) of `holder` whose value the table refuses."""
    for name, option in table.items():
        value = holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)
        if option.refusal is not None and value is not None and option.refusal.when(value):
            shown = f"={value!r}" if isinstance(value, bool | int | float | str | list | tuple | dict) else ""
            raise NotImplementedError(f"{prefix}{name}{shown} is not supported: {option.refusal.why}")


def unknown_fields(arguments: Any, known: Mapping[str, Any]) -> Iterator[str]:
    """Fields that transformers or TRL declare for a class of arguments and that no table knows."""
    declared = {
        name
        for base in type(arguments).__mro__
        if base.__module__.split(".")[0] in ("transformers", "trl")
        for name in get_annotations(base)
    }
    yield from (field.name for field in fields(arguments) if field.name in declared and field.name not in known)
