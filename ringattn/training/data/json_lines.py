"""A line of a JSONL file as Python has it, and nothing else than what it says."""

import json
from typing import Any


def parsed(line: bytes) -> Any:
    """What a line of UTF-8 JSON holds.

    Raises ValueError for what is not UTF-8 (UnicodeDecodeError), for what is not JSON, and for an object that has a
    key twice, of which Python would take the last and other readers the first. RecursionError where it is too deep.
    """
    # Of bytes, json would guess the encoding, and take halves of characters.
    return _DECODER.decode(line.decode("utf-8"))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key {twice!r} twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
