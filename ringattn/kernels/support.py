"""The table of docs/backends.md, what each backend can do, generated from the capability records.

`python -m ringattn.kernels.support docs/backends.md` brings the file up to date; without a file it prints the table.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from ringattn.kernels.registry import builtin
from ringattn.kernels.spec import Backend, Capability

BEGIN = "<!-- backends: made by python -m ringattn.kernels.support docs/backends.md -->"
END = "<!-- end of backends -->"
FEATURES = {
    "window": "window",
    "softcap": "softcap",
    "dropout": "dropout",
    "unequal_head_dims": "V ≠ D",
    "deterministic": "deterministic",
}


def table(backends: Sequence[Backend] | None = None) -> str:
    """Markdown: a row per backend in the order of "auto". Sinks are applied outside of kernels: every one has them."""
    header = ["backend", "devices", "dtypes", "head dims", *FEATURES.values(), "sinks"]
    rows = [header, ["---"] * len(header)]
    for backend in builtin() if backends is None else backends:
        declared = backend.capability
        marks = ["✓" if getattr(declared, name) else "–" for name in FEATURES]
        rows.append([f"`{backend.name}`", _devices(declared), _dtypes(declared), _head_dims(declared), *marks, "✓"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def replaced(text: str) -> str:
    """A document with the present table between its markers. Raises ValueError if it has not one of each."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the document must have the lines {BEGIN!r} and {END!r}, once each and in this order")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def _devices(declared: Capability) -> str:
    names = " ".join("CUDA" if name == "cuda" else name for name in declared.devices) or "any"
    if declared.compute_capability is None:
        return names
    (low, minor), (high, _) = declared.compute_capability
    above = f" to below {high}.0" if high < 99 else " and up"
    return f"{names} {low}.{minor}{above}"


def _dtypes(declared: Capability) -> str:
    short = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}
    names = [str(dtype).removeprefix("torch.") for dtype in declared.dtypes]
    return " ".join(short.get(name, name) for name in names) or "any"


def _head_dims(declared: Capability) -> str:
    words = [f"≤ {declared.max_head_dim}"] if declared.max_head_dim is not None else []
    words += [f"multiples of {declared.head_dim_multiple}"] if declared.head_dim_multiple > 1 else []
    return ", ".join(words) or "any"


def main(argv: Sequence[str]) -> int:
    if not argv:
        print(table())
    for name in argv:
        path = Path(name)
        path.write_text(replaced(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
