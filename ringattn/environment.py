"""The environment variables that ringattn reads, all of them, and a warning for those that it does not know.

None changes the mathematics: they choose a backend, a folder, a file, how long to measure, what is told or the order
of sums.
"""

import logging
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
DETERMINISTIC = Variable(
    "RINGATTN_DETERMINISTIC",
    "`on`: every attention asks its kernel for gradients that are equal from run to run, as `deterministic=True` does",
    "off",
    ("off", "on"),
)
LOG = Variable(
    "RINGATTN_LOG",
    "`info` tells on stderr which backend does which call, `debug` also how tuning went",
    "off",
    ("off", "info", "debug"),
)
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

_ALL = (BACKEND, AUTOTUNE, CACHE_DIR, SHARED_MEMORY_KIB, FA3_LIBRARY, DETERMINISTIC, LOG, MACHINE, CHECK_PLANS)
VARIABLES = {variable.name: variable for variable in _ALL}


def of_a_call() -> tuple[str | None, ...]:
    """The variables that decide how an attention is computed, as they are set now: a call after a change heeds it."""
    get = os.environ.get
    return get(BACKEND.name), get(AUTOTUNE.name), get(DETERMINISTIC.name)


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


@cache
def logger() -> logging.Logger:
    """The logger `ringattn`: as RINGATTN_LOG says on stderr, without it as the program set up logging."""
    made, level = logging.getLogger("ringattn"), LOG.read() or "off"
    if level != "off":
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("ringattn: %(message)s"))
        made.addHandler(handler)
        made.setLevel(level.upper())
    return made
