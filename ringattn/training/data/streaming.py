"""Documents tokenized as they are read, for what does not fit a disk: no cache, and any place can be gone on from.

Every rank reads all documents, since the packs of all replicas are planned by every rank: tokenizing costs each of them
what it would cost one process. With a cache it is done once.
"""

import os
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ringattn.training.data.encoding import Encode, Encoding
from ringattn.training.data.records import Record
from ringattn.training.data.shards import Shard
from ringattn.training.data.source_store import STOP
from ringattn.training.data.workers import outcome

RECORDS, SHARDS = 32, 22
"""Bits of a document's number for its record and its shard; the source comes above them."""
KEPT = 1 << 28  # bytes of documents that are kept in memory; what was dropped is read again
_SHOWN = 5


@dataclass(frozen=True)
class StreamedPart:
    """One source of a stream.

    Arguments:
        name: for people.
        shards: read in an order that is drawn for each pass; the records of each in their own.
        encoding: from records to tokens.
        weight, epochs: as of `Part`.
        max_tokens: of a pass, which ends before the document that would go beyond; one that has more alone is passed
            over, whichever pass it would begin. None: no limit.
    """

    name: str
    shards: tuple[Shard, ...]
    encoding: Encoding
    weight: float
    epochs: int | None = None
    max_tokens: int | None = None


@dataclass
class StreamedCorpus:
    """The documents of all parts; a document's number says where it is read.

    Arguments:
        parts: the sources.
        vocab_size: of the model: every id must be smaller.
        fingerprint: changes with the parts, as far as this is known without reading them through.
        on_error: `stop`, or `skip` what cannot be used.
    """

    parts: tuple[StreamedPart, ...]
    vocab_size: int
    fingerprint: str
    on_error: str = STOP
    skipped: int = 0
    longest: int = 1 << 62  # nobody knows
    _kept: "OrderedDict[int, tuple[Any, Any]]" = field(default_factory=OrderedDict, repr=False)
    _bytes: int = 0
    _encoders: dict[int, Encode] = field(default_factory=dict, repr=False)
    _first_errors: dict[int, str] = field(default_factory=dict, repr=False)  # by source

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": OrderedDict(), "_bytes": 0, "_encoders": {}}

    def cursor(self, source: int, seed: int, state: Sequence[int]) -> "StreamedSource":
        """The order of one source, from its place on."""
        return StreamedSource(self, source, seed, state)

    def length(self, document: int) -> int:
        """Tokens of one document."""
        return len(self._document(document)[0])

    def read(self, document: int, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Tokens `[start, stop)` of one document, (stop - start,) int64."""
        ids: npt.NDArray[Any] = self._document(document)[0]
        return ids[start:stop].astype(np.int64)

    def learned(self, document: int, start: int, stop: int) -> npt.NDArray[np.bool_] | None:
        """Which of the tokens `[start, stop)` of one document may be targets, (stop - start,); None: all."""
        mask: npt.NDArray[np.bool_] | None = self._document(document)[1]
        return None if mask is None else mask[start:stop]

    def take_in(self, source: int, shard: int, record: Record) -> int | None:
        """Tokens of a record, which is kept for a while; None for one that is passed over.

        Raises ValueError, with its place, for a record that cannot be used, if that is to stop.
        """
        encode = self._encoders.get(source)
        if encode is None:
            encode = self._encoders[source] = self.parts[source].encoding.build()
        found = outcome(record, encode)
        if found.error:
            if self.on_error == STOP:
                raise ValueError(f"{found.error} (data.on_error=skip passes over such records and counts them)")
            self._first_errors.setdefault(source, found.error)
            self._pass_over(found.error)
        if found.encoded is None:
            return None
        ids, mask = found.encoded
        if len(ids) and int(ids.max()) >= self.vocab_size:
            raise ValueError(f"{record.where}: id {int(ids.max()):,} is not below the model's {self.vocab_size:,}")
        self._keep(number_of(source, shard, record.number), ids.astype(np.uint32), mask)
        return len(ids)

    def nothing_in(self, source: int) -> str:
        """What is said of a source in which a whole pass found no document."""
        limit = self.parts[source].max_tokens
        capped = f" of at most max_tokens={limit:,}" if limit else ""
        first = self._first_errors.get(source)
        passed = f": records were passed over, the first: {first}" if first else ""
        return f"data.sources: {self.parts[source].name!r} holds no document{capped}{passed}"

    def has_target(self, document: int) -> bool:
        """Whether a token behind the first one of a document is learned."""
        ids, mask = self._document(document)
        return len(ids) > 1 and (mask is None or bool(mask[1:].any()))

    def _document(self, document: int) -> tuple[Any, Any]:
        if document not in self._kept:
            source, shard, number = place_in(document)
            part = self.parts[source]
            for record in part.shards[shard].records(part.encoding.field, number):
                if record.value is not None or record.error:
                    self.take_in(source, shard, record)
                    break
            if document not in self._kept:
                raise ValueError(f"record {number + 1:,} of {part.shards[shard]} is gone since the checkpoint")
        self._kept.move_to_end(document)
        return self._kept[document]

    def _keep(self, document: int, ids: npt.NDArray[np.uint32], mask: npt.NDArray[np.bool_] | None) -> None:
        if document in self._kept:
            return
        self._kept[document] = ids, mask
        self._bytes += ids.nbytes + (0 if mask is None else mask.nbytes)
        while self._bytes > KEPT and len(self._kept) > 1:
            _, (old, old_mask) = self._kept.popitem(last=False)
            self._bytes -= old.nbytes + (0 if old_mask is None else old_mask.nbytes)

    def _pass_over(self, error: str) -> None:
        self.skipped += 1
        if self.skipped <= _SHOWN and os.environ.get("RANK", "0") == "0":
            print(f"warning: passed over: {error}", file=sys.stderr, flush=True)


class StreamedSource:
    """The order of one source of a stream: shards in an order that is drawn for each pass, and their records in theirs.

    Arguments:
        state: passes done, shards of this one that are used up, the next record, its tokens and those of the pass that
            are used up; or the passes alone.
    """

    def __init__(self, corpus: StreamedCorpus, source: int, seed: int, state: Sequence[int]) -> None:
        self.corpus, self.source, self.seed, self.part = corpus, source, seed, corpus.parts[source]
        self._epoch, self._shard, self._record, self._offset, self._tokens = [*state, 0, 0, 0, 0][:5]
        self._records: Iterator[Record] | None = None
        self._found: tuple[int, int] | None = None  # number and tokens of the next document
        self._any = self._epoch > 0 or self._tokens > 0
        self._learned = self._any or self._shard + self._record > 0  # what came before the place is believed to be

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_records": None, "_found": None}

    @property
    def state(self) -> tuple[int, ...]:
        return self._epoch, self._shard, self._record, self._offset, self._tokens

    @property
    def passes(self) -> float:
        return self._epoch + self._shard / len(self.part.shards)

    def peek(self) -> tuple[int, int, int] | None:
        """Number, tokens, and used tokens of the next document; None after the last pass.

        Raises ValueError for what cannot be read, and for a source without any document.
        """
        while self._found is None:
            if self.part.epochs is not None and self._epoch >= self.part.epochs:
                return None
            if self._shard == len(self.part.shards):
                self._check_learned()
                self._next_pass()
            else:
                self._advance()
        return (*self._found, self._offset)

    def take(self, tokens: int) -> None:
        assert self._found is not None, "peek comes first"
        self._offset += tokens
        self._tokens += tokens
        self._any = True
        if self._offset == self._found[1]:
            self._record, self._offset, self._found = self._record + 1, 0, None

    def _advance(self) -> None:
        """The next record of the open shard is looked at; at its end the next shard is opened."""
        shard = self._order()[self._shard]
        if self._records is None:
            self._records = self.part.shards[shard].records(self.part.encoding.field, self._record)
        record = next(self._records, None)
        if record is None:
            self._shard, self._record, self._records = self._shard + 1, 0, None
            return
        tokens = self.corpus.take_in(self.source, shard, record)
        self._record = max(self._record, record.number)
        limit = self.part.max_tokens
        if not tokens or (limit is not None and tokens > limit):
            return
        if limit is not None and self._tokens - self._offset + tokens > limit:
            self._next_pass()
            return
        self._found = number_of(self.source, shard, record.number), tokens
        self._learned = self._learned or self.corpus.has_target(self._found[0])

    def _check_learned(self) -> None:
        """At the end of a pass that met every document: one that max_tokens ended met some of them."""
        if self._any and not self._learned:
            raise ValueError(
                f"data.sources: none of the documents of {self.part.name!r} has a target: nothing behind their first "
                "token is learned"
            )

    def _next_pass(self) -> None:
        if not self._any:
            raise ValueError(self.corpus.nothing_in(self.source))
        self._epoch, self._shard, self._record, self._tokens, self._records = self._epoch + 1, 0, 0, 0, None
        self._any = False

    def _order(self) -> list[int]:
        random = np.random.default_rng([self.seed, self._epoch, self.source])
        return [int(one) for one in random.permutation(len(self.part.shards))]


def number_of(source: int, shard: int, record: int) -> int:
    """A document's number: 62 bits that say where it is read."""
    return (source << (SHARDS + RECORDS)) | (shard << RECORDS) | record


def place_in(document: int) -> tuple[int, int, int]:
    """Source, shard and record of a document's number."""
    return document >> (SHARDS + RECORDS), (document >> RECORDS) & ((1 << SHARDS) - 1), document & ((1 << RECORDS) - 1)
