"""The corpora of `data.sources` and `data.validation`: tokenized once into the cache, or streamed."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from omegaconf import DictConfig, OmegaConf

from ringattn.training.data.chat import template_of
from ringattn.training.data.contents import Content, contents_of
from ringattn.training.data.corpus import Corpus, _locked
from ringattn.training.data.encoding import Encoding
from ringattn.training.data.mixture import MixedCorpus, Part, capped, weights_of
from ringattn.training.data.shards import Shard, shards_of
from ringattn.training.data.source_store import FORMAT, STOP, SourceStore, digest_of, open_source, write_source
from ringattn.training.data.sources import Source, sources_of
from ringattn.training.data.streaming import SHARDS, StreamedCorpus, StreamedPart
from ringattn.training.data.targets import check_targets
from ringattn.training.data.tokenizer import BYTES, load_tokenizer, saved_tokenizer
from ringattn.training.data.workers import default_processes

CACHE = "~/.cache/ringattn/tokens"
CheckVocabulary = Callable[[int], None]


class Loader:
    """Opens sources as a configuration's `data` says.

    Arguments:
        data: the group of keys; those that its option does not have are at their defaults.
        own: folders that the run writes, which are not its data.
        check_vocabulary: raises ValueError for more tokens than the model knows, before anything is tokenized.
        vocab_size: of the model: what a stream of ids is checked by.

    What people should know of held-out sources is added to `notes`.
    """

    def __init__(
        self, data: DictConfig, own: Sequence[Path], check_vocabulary: CheckVocabulary, vocab_size: int = 1 << 32
    ) -> None:
        self.data, self.check, self.vocab_size = data, check_vocabulary, vocab_size
        self.cache = Path(data.get("cache") or CACHE).expanduser()
        self.own = (*own, self.cache.resolve())
        self.tokenizer: str = data.get("tokenizer") or BYTES
        self.add_eos: bool = data.get("add_eos", True)
        self.on_error: str = data.get("on_error") or STOP
        self.notes: list[str] = []
        self._of_tokenizer: tuple[str, int] | None = None

    def mixture(self, sources: Sequence[Source]) -> MixedCorpus:
        """All sources in the cache. Raises ValueError for what cannot be used."""
        corpora, notes = [], list[str]()
        for number, source in enumerate(sources):
            where = f"data.sources[{number}]"
            store, corpus = self.opened(source, where)
            corpora.append(corpus)
            notes += _passed_over(source, store) + _checked(corpus, source, where)
        sizes = [one.total * (source.epochs or 1) for one, source in zip(corpora, sources, strict=True)]
        weights = weights_of([source.weight for source in sources], sizes)
        triples = zip(sources, corpora, weights, strict=True)
        parts = tuple(Part(source.name, corpus, weight, source.epochs) for source, corpus, weight in triples)
        return MixedCorpus(parts, tuple(notes))

    def opened(self, source: Source, where: str) -> tuple[SourceStore, Corpus]:
        """One source: tokenized by the first process that asks, while others wait, and opened by all.

        Raises ValueError that names the source, the file or the cache.
        """
        encoding, vocab_size = self.encoding(source, where)
        shards = shards_of(source, where, self.own)
        try:
            files = [(path, number) for number, shard in enumerate(shards) for path in shard.files()]
            contents = self._contents([path for path, _ in files])
            fingerprint = self._fingerprint(source, encoding, shards, contents)
            store = self._store(fingerprint, shards, encoding, vocab_size, contents)
        except ValueError as error:
            raise ValueError(f"{where}: {str(error).removeprefix('data.files: ')}") from None
        if not len(store.tokens):
            raise ValueError(f"{where}: {source.path or source.hub!r} holds {_nothing(store)}")
        if source.kind == "ids" and store.vocab_size > self.vocab_size:
            raise ValueError(f"{where}: {_beyond(store, self.vocab_size)}")
        self.check(store.vocab_size)
        try:
            whole = Corpus(store.tokens, store.offsets, store.vocab_size, fingerprint, store.mask, store.digests)
            return store, capped(whole, source.max_tokens)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def stream(self, sources: Sequence[Source]) -> StreamedCorpus:
        """All sources, read while training goes on. Raises ValueError for what cannot be used."""
        parts, facts = [], list[Any]()
        for number, source in enumerate(sources):
            where = f"data.sources[{number}]"
            encoding, _ = self.encoding(source, where)
            shards = tuple(shards_of(source, where, self.own, streaming=True))
            if len(shards) > 1 << SHARDS:
                raise ValueError(f"{where} has {len(shards):,} files, and a stream counts {1 << SHARDS:,} at most")
            weight = source.weight or 1.0
            parts.append(StreamedPart(source.name, shards, encoding, weight, source.epochs, source.max_tokens))
            try:
                likeness = [shard.likeness() for shard in shards]
            except OSError as error:
                raise ValueError(f"{where}: cannot be read: {error.strerror}") from None
            facts.append([likeness, source.content, encoding.fingerprint(self._known()[0]), weight])
            facts[-1] += [source.epochs, source.max_tokens, self.on_error]
        return StreamedCorpus(tuple(parts), self.vocab_size, _hash(["stream", FORMAT, facts]), self.on_error)

    def encoding(self, source: Source, where: str) -> tuple[Encoding, int]:
        """How a source's records become tokens, and of how many the tokenizer has; 0 for ids."""
        if source.kind == "ids":
            return Encoding("ids", source.field, source.mask_field), 0
        vocab_size = self._known()[1]
        self.check(vocab_size)
        template, special, loss_on = None, "", self.data.get("loss_on") or "assistant"
        if source.kind == "chat" and self.tokenizer != BYTES:
            model = saved_tokenizer(self.tokenizer)
            own = model.chat_template
            given = template_of(model, self.data.get("chat_template"))
            template = given or (own.get("default") if isinstance(own, dict) else own)
            special = json.dumps(model.special_tokens_map, sort_keys=True, default=str)
        encoding = Encoding(source.kind, source.field, None, self.tokenizer, self.add_eos, loss_on, template, special)
        try:
            encoding.build()  # refused here, and not in the middle
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        return encoding, vocab_size

    def _known(self) -> tuple[str, int]:
        """Fingerprint and size of the tokenizer."""
        if self._of_tokenizer is None:
            tokenizer = load_tokenizer(self.tokenizer, self.add_eos)
            self._of_tokenizer = tokenizer.fingerprint, tokenizer.vocab_size
        return self._of_tokenizer

    def _contents(self, files: Sequence[Path]) -> list[Content]:
        memory = self.cache / "digests.json"
        try:
            with _locked(self.cache / "digests.lock"):
                return contents_of(files, memory, text=False)
        except OSError:  # a cache that cannot be written to may hold the tokens all the same
            return contents_of(files, memory, remember=False, text=False)

    def _fingerprint(
        self, source: Source, encoding: Encoding, shards: Sequence[Shard], contents: Sequence[Content]
    ) -> str:
        kinds = [[one.digest, "".join(one.path.suffixes[-2:]).lower()] for one in contents]
        of_tokenizer = "" if source.kind == "ids" else self._known()[0]
        return _hash(["source", FORMAT, len(shards), kinds, encoding.fingerprint(of_tokenizer), self.on_error])

    def _store(
        self,
        fingerprint: str,
        shards: Sequence[Shard],
        encoding: Encoding,
        vocab_size: int,
        contents: Sequence[Content],
    ) -> SourceStore:
        def unchanged() -> None:
            for content in contents:
                content.check_unchanged()

        folder = self.cache / fingerprint
        processes = self.data.get("processes") or default_processes()
        try:
            with _locked(self.cache / f"{fingerprint}.lock"):
                return open_source(folder) or write_source(
                    folder, shards, encoding, vocab_size, self.on_error, processes, unchanged
                )
        except OSError as error:
            # A cache that cannot be written to may hold the tokens all the same.
            if (store := open_source(folder)) is not None:
                return store
            reason = error.strerror or error
            raise ValueError(f"data.cache={str(self.cache)!r} cannot be used: {reason}") from None


def validation_of(data: DictConfig) -> tuple[Source, ...]:
    """The held-out sources of `data.validation`, a list of sources or one source by each name; a path is one, too.

    Raises ValueError for what they cannot have: each is read once, whole.
    """
    values = data.get("validation")
    if values is None:
        return ()
    plain = OmegaConf.to_container(values) if OmegaConf.is_config(values) else values
    if isinstance(plain, Mapping):
        named = plain.items()
        plain = [{"name": str(name), **(one if isinstance(one, Mapping) else {"path": one})} for name, one in named]
    sources = sources_of(plain, "data.validation")
    for number, source in enumerate(sources):
        if source.weight is not None or source.epochs is not None:
            raise ValueError(f"data.validation[{number}] is read once and whole: it has no weight and no epochs")
    return sources


def load_validation(loader: Loader) -> dict[str, Corpus]:
    """The held-out corpora of `data.validation` by name; empty without any. Raises ValueError."""
    sources = validation_of(loader.data)
    where = "data.validation[{}]"
    found = dict[str, Corpus]()
    for number, source in enumerate(sources):
        store, found[source.name] = loader.opened(source, where.format(number))
        loader.notes += _passed_over(source, store)
        loader.notes += _checked(found[source.name], source, where.format(number))
    return found


def shared_documents(training: Corpus | MixedCorpus, held_out: Corpus) -> int:
    """How many documents of a held-out corpus are also in the training data, token for token; empty ones do not
    count."""
    ours, theirs = document_digests(training), document_digests(held_out)
    return int(np.isin(theirs[held_out.lengths > 0], ours).sum())


def document_digests(corpus: Corpus | MixedCorpus) -> npt.NDArray[np.uint64]:
    """(documents,) a number for each by its tokens: read, where it was not made with the cache."""
    if isinstance(corpus, MixedCorpus):
        return np.concatenate([document_digests(part.corpus) for part in corpus.parts])
    if corpus.digests is not None:
        return corpus.digests
    count = range(len(corpus))
    return np.asarray([digest_of(corpus.read(one, 0, corpus.length(one))) for one in count], np.uint64)


def _passed_over(source: Source, store: SourceStore) -> list[str]:
    if not store.skipped:
        return []
    return [f"warning: {source.name}: {store.skipped:,} records were passed over, the first: {store.messages[0]}"]


def _nothing(store: SourceStore) -> str:
    """What a source without a token holds."""
    documents = f"{len(store.digests):,} documents without a token" if len(store.digests) else "no document at all"
    if not store.skipped:
        return documents
    rest = f" beside {documents}" if len(store.digests) else ""
    return f"nothing that can be used{rest}: {store.skipped:,} records were passed over, the first: {store.messages[0]}"


def _beyond(store: SourceStore, known: int) -> str:
    """What is said of ids that a model with so many tokens does not know."""
    largest = store.vocab_size - 1
    at = next(iter(np.flatnonzero(store.tokens == largest)))
    document = int(np.searchsorted(store.offsets, at, side="right")) - 1
    return (
        f"model.config.vocab_size={known} is less than the {store.vocab_size} tokens of its ids: {largest} stands at "
        f"{int(at - store.offsets[document]):,} of document {document + 1:,}; are they of the model's tokenizer?"
    )


def _checked(corpus: Corpus, source: Source, where: str) -> list[str]:
    try:
        return check_targets(corpus, source)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _hash(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
