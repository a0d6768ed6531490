"""`python -m ringattn.hf.options docs/trainer-options.md`: the tables as a document; printed without a file."""

import sys
from pathlib import Path

from ringattn.hf.options.document import document

if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(document())
    else:
        print(document())
