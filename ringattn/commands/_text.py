"""Text in columns, for terminals."""

import textwrap

WIDTH = 96


def row(label: str, text: str, gap: str = "  ", pad: int = 0) -> list[str]:
    """`label` and `text` in two columns; what does not fit `WIDTH` goes on below the text."""
    head = f"  {label:<{pad}}{gap if label else ''}"
    lines = textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False)
    return [line.rstrip() for line in lines] or [head.rstrip()]
