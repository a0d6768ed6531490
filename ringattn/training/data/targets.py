"""How many tokens of a corpus are targets: a run without any would end, and would have learned nothing."""

import numpy as np
import numpy.typing as npt

from ringattn.training.data.corpus import Corpus
from ringattn.training.data.sources import Source


def targets_of(corpus: Corpus) -> npt.NDArray[np.int64]:
    """(documents,) targets of each: the tokens behind its first one, as far as they are learned."""
    found = np.maximum(corpus.lengths - 1, 0)
    if corpus.mask is None:
        return found
    some = found > 0
    # Behind the first token of each document, and between documents: every other sum is of a document.
    bounds = np.stack([corpus.offsets[:-1][some] + 1, corpus.offsets[1:][some]], axis=1).reshape(-1)
    if len(bounds):
        mask = corpus.mask[: bounds[-1]]
        found[some] = np.add.reduceat(mask, bounds[:-1], dtype=np.int64)[::2]
    return found


def check_targets(corpus: Corpus, source: Source) -> list[str]:
    """What is to be said of documents without a target, if some have none.

    Raises ValueError if no document of the source has one, with what was looked for.
    """
    targets = targets_of(corpus)
    count, without = len(targets), int((targets == 0).sum())
    if count == without:
        raise ValueError(f"none of the {count:,} documents of {source.name!r} has a target: {wanted_of(source)}")
    if not without or corpus.mask is None:  # texts of a token or none are no surprise
        return []
    return [f"{source.name}: {without:,} of {count:,} documents have no target: {wanted_of(source)}"]


def wanted_of(source: Source) -> str:
    """What a document of a source needs, to have a target."""
    if source.kind == "chat":
        return "that takes a token behind the first one that is learned, see data.loss_on"
    if source.mask_field is not None:
        return f"that takes a 1 in {source.mask_field!r} behind the first entry, since nothing predicts a first token"
    return "that takes two tokens or more, since nothing predicts a first token"
