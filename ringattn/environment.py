"""The environment variables that ringattn reads, all of them, and a warning for those that it does not know.

None changes the mathematics: they choose a backend, a folder, a file or how long to measure.
"""

import os
import warnings
from dataclasses import dataclass
from functools import cache

PREFIX = "RINGATTN_"


@dataclass(frozen=True)
class Variable:
    """One variable; `choices` empty: any text. An empty value counts as unset."""

    name: str
    meaning: str
    default: str | None = None
    choices: tuple[str, ...] = ()

    def read(self) -> str | None:
        """Its value, or the default. Raises ValueError for a value that is not one of `choices`."""
        value = os.environ.get(self.name) or self.default
        if self.choices and value not in self.choices:
            raise ValueError(f"{self.name} must be one of {', '.join(self.choices)}, got {value!r}")
        return value


BACKEND = Variable("RINGATTN_BACKEND", 'the kernel backend that `backend="auto"` stands for', "auto")
AUTOTUNE = Variable(
    "RINGATTN_AUTOTUNE",
    "`on`: take the fastest backend (and FlexAttention tiles) of a shape, measured at its first call and stored; "
    "`off`: the fixed order",
    "off",
    ("off", "on"),
)
CACHE_DIR = Variable("RINGATTN_CACHE_DIR", "folder of measured results, by default `$XDG_CACHE_HOME/ringattn`")
SHARED_MEMORY_KIB = Variable(
    "RINGATTN_SHARED_MEMORY_KIB", "lowers, never raises, the shared memory that tile candidates may take"
)
FA3_LIBRARY = Variable("RINGATTN_FA3_LIBRARY", "path of a library with the FlashAttention-3 operators")
MACHINE = Variable(
    "RINGATTN_MACHINE",
    "whose speed plans are made for: a shipped machine (`H200`, `H100`, `A100`, `CPU`) or the path of a calibration "
    "file; by default the calibration of this machine (`ringattn bench --calibrate`), else the shipped one of its kind",
)
CHECK_PLANS = Variable(
    "RINGATTN_CHECK_PLANS",
    "`on`: compare every new plan once over the sequence ranks (collective), and raise if they differ",
    "off",
    ("off", "on"),
)

VARIABLES = {
    variable.name: variable
    for variable in (BACKEND, AUTOTUNE, CACHE_DIR, SHARED_MEMORY_KIB, FA3_LIBRARY, MACHINE, CHECK_PLANS)
}


def complaint() -> str | None:
    """What is wrong with the names of the variables that are set, or None: a misspelling, or one of another version."""
    unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in VARIABLES)
    if not unknown:
        return None
    return f"unknown environment variables {', '.join(unknown)}; ringattn reads {', '.join(VARIABLES)}"


@cache
def warn_of_unknown() -> None:
    """Warn of variables with our prefix that mean nothing, once per process."""
    text = complaint()
    if text is not None:
        warnings.warn(text, stacklevel=3)


def markdown() -> str:
    """The README's list."""
    return "\n".join(f"- `{name}`: {variable.meaning}" for name, variable in VARIABLES.items())
