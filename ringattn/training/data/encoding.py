"""From a record to token ids, and which of them are learned: by the kind of its source."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ringattn.training.data.chat import ChatEncoder
from ringattn.training.data.texts import said_of
from ringattn.training.data.tokenizer import BYTES, load_tokenizer, saved_tokenizer

Ids = npt.NDArray[np.int64]
Encoded = tuple[Ids, npt.NDArray[np.bool_] | None]
Encode = Callable[[Mapping[str, Any]], Encoded]
_LARGEST = 2**32 - 1  # id that a store holds


@dataclass(frozen=True)
class Encoding:
    """Everything that decides the tokens of a source's records. It can be sent to another process.

    Arguments:
        kind, field, mask_field: of the source.
        tokenizer: `bytes`, or the folder of a saved one; nothing is done with it for ids.
        add_eos: end every text with the tokenizer's end of a sequence.
        loss_on: of conversations, `assistant` or `all`.
        template: text of a chat template in the place of the tokenizer's own.
        special: of conversations, the tokenizer's special tokens by name, which templates write.
    """

    kind: str
    field: str
    mask_field: str | None = None
    tokenizer: str = BYTES
    add_eos: bool = True
    loss_on: str = "assistant"
    template: str | None = None
    special: str = ""

    def build(self) -> Encode:
        """The function from a record to (n,) ids and (n,) what is learned, None for everything.

        It raises ValueError for a record that cannot be used. Raises ValueError for a tokenizer that cannot do it.
        """
        if self.kind == "ids":
            return _PlainIds(self.field, self.mask_field)
        if self.kind == "chat":
            if self.tokenizer == BYTES:
                raise ValueError("data.tokenizer=bytes has no chat template; name the folder of one that has")
            return _Chat(self.field, ChatEncoder(saved_tokenizer(self.tokenizer), self.template, self.loss_on))
        return _Text(self.field, self.tokenizer, self.add_eos)

    def fingerprint(self, of_tokenizer: str) -> str:
        """Changes when the tokens of any record may change.

        Arguments:
            of_tokenizer: fingerprint of the tokenizer: its folder does not count.
        """
        facts = asdict(self) | {"tokenizer": of_tokenizer}
        if self.kind != "chat":
            del facts["special"]
        if self.kind == "ids":
            facts = {key: facts[key] for key in ("kind", "field", "mask_field")}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def content_of(record: Mapping[str, Any], field: str) -> Any:
    """What a record has under a key. Raises ValueError that names the keys there are."""
    if record.get(field) is None:
        missing = "" if field in record else f"it has no {field!r}; "
        raise ValueError(missing + said_of(record, field))
    return record[field]


class _Text:
    def __init__(self, field: str, tokenizer: str, add_eos: bool) -> None:
        self._field, self._tokenizer = field, load_tokenizer(tokenizer, add_eos)

    def __call__(self, record: Mapping[str, Any]) -> Encoded:
        text = content_of(record, self._field)
        if not isinstance(text, str):
            raise ValueError(f"{self._field!r} must be text, it is {type(text).__name__}")
        parts = [ids for ids, _ in self._tokenizer.pieces(text)]
        return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64), None


class _Chat:
    def __init__(self, field: str, encoder: ChatEncoder) -> None:
        self._field, self._encoder = field, encoder

    def __call__(self, record: Mapping[str, Any]) -> Encoded:
        other = "conversations" if self._field == "messages" and record.get("messages") is None else self._field
        field = other if record.get(other) is not None else self._field
        turns = content_of(record, field)
        _check_beside(record, field, turns)
        return self._encoder(turns, record.get("tools"))


def _check_beside(record: Mapping[str, Any], field: str, turns: Any) -> None:
    """Raises ValueError for what other programs put into the text from beside the turns."""
    system, first = record.get("system"), turns[0] if isinstance(turns, list) and turns else None
    said = isinstance(first, Mapping) and "system" in (first.get("role"), first.get("from"))
    if isinstance(system, str) and system.strip() and not said:
        raise ValueError(f"the record has 'system' beside {field!r}: make it the first turn, of the role system")
    if record.get("chat_template_kwargs"):
        raise ValueError(
            f"the record has 'chat_template_kwargs' beside {field!r}, and all conversations are rendered alike: set "
            "what they say in the template, data.chat_template, and leave the key out"
        )


class _PlainIds:
    def __init__(self, field: str, mask_field: str | None) -> None:
        self._field, self._mask_field = field, mask_field

    def __call__(self, record: Mapping[str, Any]) -> Encoded:
        ids = _integers(content_of(record, self._field), self._field, _LARGEST, numbers_alone=True)
        if self._mask_field is None:
            return ids, None
        mask = _integers(content_of(record, self._mask_field), self._mask_field, 1)
        if len(mask) != len(ids):
            raise ValueError(f"{self._mask_field!r} has {len(mask)} entries for the {len(ids)} ids of {self._field!r}")
        return ids, mask.astype(bool)


def _integers(value: Any, field: str, largest: int, numbers_alone: bool = False) -> Ids:
    """The integers of a list, 0 to `largest`; `numbers_alone` refuses true and false, which Python counts as 1 and 0.

    Raises ValueError that names the field.
    """
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str):
        raise ValueError(f"{field!r} must be a list of integers, it is {type(value).__name__}")
    try:
        found = np.asarray(value) if len(value) else np.zeros(0, np.int64)
    except ValueError:  # lists of different lengths
        raise ValueError(f"{field!r} must be a list of integers, it holds {str(value)[:60]}") from None
    if found.ndim != 1 or found.dtype.kind not in "iub":
        raise ValueError(f"{field!r} must be a list of integers, it holds {str(value)[:60]}")
    if numbers_alone and (found.dtype.kind == "b" or bool in set(map(type, value))):
        at = next(number for number, one in enumerate(value) if isinstance(one, bool | np.bool_))
        raise ValueError(f"{field!r} must be a list of integers, it has {str(value[at]).lower()} at {at:,}")
    if len(found) and (int(found.min()) < 0 or int(found.max()) > largest):
        raise ValueError(f"{field!r} must hold integers from 0 to {largest:,}, got {found.min()} to {found.max():,}")
    return found.astype(np.int64)
