"""What is computed: packs of documents by name, the same for the same name and seed."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from ringattn.documents import Documents
from ringattn.mask import Mask
from ringattn.parallel.geometry.views import table_of
from ringattn.workloads import HISTOGRAMS

# Mostly one long document, with a tail of ever shorter ones: tokens of a stream of 256K.
PACKED = (131072, *(32768,) * 2, *(16384,) * 2, *(8192,) * 2, *(4096,) * 2, *(2048,) * 2, *(1024,) * 3, *(512,) * 2)
SHORT = (*(4096,) * 32, *(8192,) * 8, *(16384,) * 4)
WINDOW = 4096
COMPLETIONS = 16  # of one prompt, which is half of the stream
# Of a document with images: what comes before each, and the tokens of one in Gemma 3.
TEXT, IMAGE, IMAGES_WINDOW = 512, 256, 1024


@dataclass(frozen=True)
class Workload:
    name: str
    docs: Documents
    mask: Mask

    def pairs(self) -> int:
        """Pairs of query and key that one head computes."""
        rows = [(branch, branch.first, branch.last) for branch in self.docs.branches]
        return int(table_of(rows, self.mask)[0].areas.sum())


def _dense(tokens: int, seed: int) -> Documents:
    return Documents([tokens])


def _scaled(lengths: tuple[int, ...], tokens: int) -> Documents:
    """Lengths of a stream of 256K tokens in one of `tokens`."""
    scaled = [max(1, length * tokens // 2**18) for length in lengths]
    return Documents([*scaled, max(0, tokens - sum(scaled))])


def _drawn(tokens: int, seed: int) -> Documents:
    return Documents(HISTOGRAMS["chatqa"].pack(tokens, seed, longest=max(1, tokens // 4)))


def _tree(tokens: int, seed: int) -> Documents:
    rest = tokens - tokens // 2
    lengths = [rest * (i + 1) // COMPLETIONS - rest * i // COMPLETIONS for i in range(COMPLETIONS)]
    lengths = [length for length in lengths if length]
    return Documents.from_tree([tokens - sum(lengths), *lengths], [-1, *[0] * len(lengths)])


def _apart(tokens: int, seed: int) -> Documents:
    return Documents([tokens * (i + 1) // COMPLETIONS - tokens * i // COMPLETIONS for i in range(COMPLETIONS)])


def _images(count: int) -> Callable[[int, int], Documents]:
    """Documents of equal length, in which text and images take turns; in very short ones both are shorter."""

    def make(tokens: int, seed: int) -> Documents:
        lengths = [tokens * (i + 1) // count - tokens * i // count for i in range(count)]
        blocks, start = [], 0
        for length in lengths:
            text, image = (max(1, min(size, length * size // (TEXT + IMAGE) // 2)) for size in (TEXT, IMAGE))
            begins = range(start + text, start + length, text + image)
            blocks += [(begin, min(begin + image, start + length)) for begin in begins]
            start += length
        return Documents(lengths, blocks=blocks)

    return make


_KINDS: dict[str, tuple[Callable[[int, int], Documents], Mask]] = {
    "dense": (_dense, Mask()),
    "packed": (lambda tokens, seed: _scaled(PACKED, tokens), Mask()),
    "short": (lambda tokens, seed: _scaled(SHORT, tokens), Mask()),
    "hist": (_drawn, Mask()),
    "window": (_dense, Mask(window=(WINDOW - 1, 0))),
    "tree": (_tree, Mask()),
    "apart": (_apart, Mask()),
    "images": (_images(4), Mask()),
    "clipped": (_images(1), Mask(window=(IMAGES_WINDOW - 1, 0), blocks="clipped")),
}
KINDS = ", ".join(_KINDS)


def sequences_of(name: str) -> str:
    """The workload of a tree's sequences, each by itself: "apart544k" of "tree64k"; "" for what is no tree."""
    found = re.fullmatch(r"tree(\d+)(k?)", name.lower())
    if found is None or int(found[1]) % 2:
        return ""
    return f"apart{int(found[1]) // 2 * (COMPLETIONS + 1)}{found[2]}"


def workload(name: str, seed: int) -> Workload:
    """A workload of `<kind><tokens>`, the tokens as a number or with k for 1,024: dense256k, hist64k, window65536.

    dense: one document. packed: half the stream one document, then ever shorter ones. short: three fixed lengths, 4K to
    16K at 256K tokens. hist: drawn from the published histogram, none longer than a quarter of the stream. window: one
    document with a causal window of 4,096. packed and short are scaled from their 256K tokens.
    tree: half the stream a prompt, and 16 completions of it. apart: 16 documents of one length; apart544k are the
    sequences of tree64k, each with the prompt. images: four documents of 512 tokens of text and an image of 256 in
    turns; clipped: one such document with a window of 1,024, as in the sliding layers of Gemma 3.

    Raises ValueError for another name.
    """
    found = re.fullmatch(r"([a-z]+)(\d+)(k?)", name.lower())
    if found is None or found[1] not in _KINDS or not int(found[2]):
        raise ValueError(f"a workload is one of {KINDS} with a number of tokens, as in hist256k, got {name!r}")
    make, mask = _KINDS[found[1]]
    return Workload(name, make(int(found[2]) * (1024 if found[3] else 1), seed), mask)
