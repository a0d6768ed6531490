"""How the newest run in a folder ended, for scripts that decide whether to start it again.

`python launch/ending.py FOLDER [SINCE]` prints one line: the state (done, stopped, failed, or unknown for a run that
could not say), yes or no for whether the same command may come further, and the steps in its newest checkpoint. With
SINCE, in seconds since 1970, what an earlier run said counts as unknown.
"""

import sys
from datetime import datetime
from pathlib import Path

from ringattn.training.health.incidents import Ending, read_ending


def ending(folder: Path, since: float) -> Ending:
    """What `exit.json` says; for a run that was killed before it could say anything, that it may be started again."""
    found = read_ending(folder)
    unknown = Ending("unknown", True, "it was killed before it could say why", 0)
    try:
        old = found is not None and datetime.fromisoformat(found.time).timestamp() < since
    except ValueError:
        old = True
    return unknown if found is None or old else found


if __name__ == "__main__":
    said = ending(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
    print(said.state, "yes" if said.restart else "no", said.step)
