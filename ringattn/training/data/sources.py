"""What a person lists under `data.sources`: where documents are, what they are, and how much of each is wanted."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

KINDS = ("text", "ids", "chat")
FIELDS = {"text": "text", "ids": "input_ids", "chat": "messages"}
"""Where a record of each kind has its content, unless the source says otherwise."""


@dataclass(frozen=True)
class Source:
    """Documents of one kind from one place.

    Arguments:
        path: a file, folder or glob pattern, or a folder that `datasets` saved. Either this or `hub`.
        hub: a data set that `datasets.load_dataset` finds: a name on the hub, or a local folder.
        config, split: which part of a data set.
        kind: `text`, `ids` (pre-tokenized) or `chat` (conversations).
        field: key of the content in a record.
        mask_field: of `ids`: key of the loss mask, one 0 or 1 for each id; absent, every id is learned.
        weight: share of the tokens of the mixture, relative to the others; None: by its size.
        epochs: passes after which it no longer takes part; None: no limit.
        max_tokens: of a pass; documents are taken, whole, as long as there are no more.
        name: for people.
    """

    path: str | None = None
    hub: str | None = None
    config: str | None = None
    split: str | None = None
    kind: str = "text"
    field: str = ""
    mask_field: str | None = None
    weight: float | None = None
    epochs: int | None = None
    max_tokens: int | None = None
    name: str = ""

    @property
    def content(self) -> dict[str, Any]:
        """What decides which documents it has, and in which tokens: the place, and how much is wanted, do not."""
        return {key: value for key, value in asdict(self).items() if key in ("kind", "field", "mask_field", "split")}


def sources_of(values: Any, key: str = "data.sources") -> tuple[Source, ...]:
    """The sources of a plain list of mappings.

    Raises ValueError that names the entry, what it holds and what it may hold.
    """
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"{key} must be a list, got {values!r}; write '{key}=[{{path: /data/books}}]'")
    sources = tuple(_source(one, f"{key}[{number}]") for number, one in enumerate(values))
    names = [one.name for one in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{key}: {', '.join(twice)} is the name of two sources; give each its own `name`")
    weights = [one.weight for one in sources]
    if None in weights and any(weight is not None for weight in weights):
        raise ValueError(f"{key}: some sources have a weight and some have none; give all of them one, or none")
    return sources


def _source(value: Any, where: str) -> Source:
    if isinstance(value, str):
        value = {"path": value}
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a mapping such as {{path: /data/books}}, got {value!r}")
    known = [one.name for one in fields(Source)]
    if unknown := sorted(set(map(str, value)) - set(known)):
        raise ValueError(f"{where} has no key {', '.join(unknown)}; there are {', '.join(known)}")
    given = {key: one for key, one in value.items() if one is not None}
    for key in ("path", "hub", "config", "split", "field", "mask_field", "name"):
        if key in given and (not isinstance(given[key], str) or not given[key]):
            raise ValueError(f"{where}.{key} must be text, got {given[key]!r}")
    if ("path" in given) == ("hub" in given):
        raise ValueError(f"{where} must have either `path` or `hub`, got {', '.join(given) or 'nothing'}")
    kind = given.setdefault("kind", "text")
    if kind not in KINDS:
        raise ValueError(f"{where}.kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if "mask_field" in given and kind != "ids":
        raise ValueError(f"{where}.mask_field is of kind=ids, and this source is kind={kind}")
    weight = given.get("weight")
    good = isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight) and weight > 0
    if weight is not None and not good:
        raise ValueError(f"{where}.weight must be a positive finite number, got {weight!r}")
    for key in ("epochs", "max_tokens"):
        one = given.get(key)
        if one is not None and (not isinstance(one, int) or isinstance(one, bool) or one < 1):
            raise ValueError(f"{where}.{key} must be an integer of at least 1, got {one!r}")
    given.setdefault("field", FIELDS[kind])
    given.setdefault("name", Path(given.get("path") or given["hub"]).name.strip("*") or "source")
    return Source(**given)
