"""Files that commands read and write: looked at before the work, so that it is not done in vain."""

import argparse
import os
import tempfile
from pathlib import Path


def file(text: str) -> Path:
    """The type of an option that names a file. `~` is the home, which shells leave alone in `--option=~/file`."""
    if not text:
        raise argparse.ArgumentTypeError("expected a file, got ''")
    return Path(text).expanduser()


def check_target(option: str, path: Path) -> None:
    """See that `path` can be written, and make its folder. Raises ValueError that names the option and the reason."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            with path.open("ab"):  # as it is
                return
        with tempfile.TemporaryFile(dir=path.parent):
            return
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be written: {reason(error)}") from None


def reason(error: OSError) -> str:
    """Why, in the words of the operating system."""
    return error.strerror or (os.strerror(error.errno) if error.errno else str(error))
