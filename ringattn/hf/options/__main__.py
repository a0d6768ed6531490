"""`python -m ringattn.hf.options docs/trainer-options.md`: the tables as a document."""

import sys
from pathlib import Path

from ringattn.hf.options.document import document

if __name__ == "__main__":
    Path(sys.argv[1]).write_text(document())
