"""Text in columns, for terminals."""

import sys
import textwrap
from collections.abc import Sequence

WIDTH = 96


def note(text: str) -> None:
    """Tell somebody who waits at a terminal; programs and files get nothing."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    """What went wrong, without what libraries tell about it on further lines."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def row(label: str, text: str, gap: str = "  ", pad: int = 0) -> list[str]:
    """`label` and `text` in two columns; what does not fit `WIDTH` goes on below the text."""
    head = f"  {label:<{pad}}{gap if label else ''}"
    lines = textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False)
    return [line.rstrip() for line in lines] or [head.rstrip()]


def table(rows: Sequence[Sequence[str]], left: int = 0) -> list[str]:
    """Rows in columns, the first `left` aligned to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
