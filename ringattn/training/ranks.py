"""Ranks in a sentence, and what they say differently."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ringattn.training.secrets import redacted

LONGEST = 80  # letters of a value that are shown
MOST = 10  # keys that are shown


def listed(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 0 to 5, 7`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    parts: list[str] = []
    for first, last in runs:
        parts += [f"{first} to {last}"] if last > first + 1 else map(str, range(first, last + 1))
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}"


def differences(answers: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each key that ranks have other values of: `optim.lr is 0.0003 on ranks 0, 1 and 0.001 on rank 2`.

    Arguments:
        answers: of all ranks in their order, what JSON can hold. The value of a secret is compared and not shown.
    """
    lines = []
    for key in dict.fromkeys(key for answer in answers for key in answer):
        ranks_of: dict[str, list[int]] = {}
        for rank, answer in enumerate(answers):
            value = answer.get(key, "(absent)")
            ranks_of.setdefault(json.dumps(value, sort_keys=True, default=str), []).append(rank)
        if len(ranks_of) > 1:
            values = [f"{_shown(key, json.loads(value))} on {listed(ranks)}" for value, ranks in ranks_of.items()]
            lines.append(f"{key} is {' and '.join(values)}")
    return lines


def joined(lines: Sequence[str]) -> str:
    """Not more of them than people read."""
    more = f"; and {len(lines) - MOST} more" if len(lines) > MOST else ""
    return "; ".join(lines[:MOST]) + more


def _shown(key: str, value: Any) -> str:
    hidden = redacted(value, key)
    text = hidden if isinstance(hidden, str) else json.dumps(hidden)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
