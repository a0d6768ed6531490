"""Document lengths to plan, simulate and measure with: published histograms and packs drawn from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random


@dataclass(frozen=True)
class Histogram:
    """Shares of documents by length.

    Arguments:
        bins: `(shortest, longest, weight)`, both ends included; weights need not add up to anything.
        source: who published it.
    """

    bins: tuple[tuple[int, int, float], ...]
    source: str

    @property
    def longest(self) -> int:
        return max(last for _, last, _ in self.bins)

    def draw(self, random: Random) -> int:
        """One length: a bin by its weight, uniform inside it."""
        (bin_,) = random.choices(self.bins, [weight for *_, weight in self.bins])
        return random.randint(bin_[0], bin_[1])

    def pack(self, tokens: int, seed: int, longest: int | None = None, most: int | None = None) -> list[int]:
        """Lengths of one packed stream of exactly `tokens` tokens, the same for the same seed.

        Arguments:
            longest: no document is longer (default: no limit but the stream's); longer draws are cut to it, and so is
                the last document to what is left.
            most: documents; of more a ValueError.
        """
        if tokens < 1:
            raise ValueError(f"tokens must be >= 1, got {tokens}")
        if longest is not None and longest < 1:
            raise ValueError(f"longest must be >= 1, got {longest}")
        random = Random(seed)
        lengths: list[int] = []
        left = tokens
        while left:
            if most is not None and len(lengths) == most:
                raise ValueError(f"expected at most {most} documents, and there are more in {tokens} tokens")
            lengths.append(min(self.draw(random), longest or tokens, left))
            left -= lengths[-1]
        return lengths


HISTOGRAMS: dict[str, Histogram] = {
    "chatqa": Histogram(
        bins=(
            (1, 10, 0.22),
            (11, 50, 2.91),
            (51, 100, 5.2),
            (101, 200, 10.23),
            (201, 500, 28.19),
            (501, 1024, 24.64),
            (1025, 2048, 15.65),
            (2049, 4096, 7.34),
            (4097, 8192, 3.05),
            (8193, 16384, 1.29),
            (16385, 32768, 0.85),
            (32769, 65536, 0.14),
            (65537, 131072, 0.17),
            (131073, 196608, 0.14),
        ),
        source="lengths of the ChatQA 2 data as MagiAttention's long-context attention benchmark draws them",
    ),
}


def read_lengths(path: Path) -> list[int]:
    """Document lengths of a text file: integers >= 0 separated by spaces, commas or lines; `#` opens a comment.

    Raises ValueError naming the file and the line.
    """
    lengths: list[int] = []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text: byte {error.start} is no UTF-8") from None
    for number, line in enumerate(text.splitlines(), 1):
        for word in line.partition("#")[0].replace(",", " ").split():
            if not word.isdecimal():
                raise ValueError(f"{path}, line {number}: a document length must be an integer >= 0, got {word!r}")
            lengths.append(int(word))
    if not sum(lengths):
        raise ValueError(f"{path} holds no document with tokens")
    return lengths


def cut_to(lengths: Sequence[int], tokens: int) -> list[int]:
    """The first documents of `lengths`, the last one cut, that make `tokens` tokens. Raises ValueError if too few."""
    out: list[int] = []
    left = tokens
    for length in lengths:
        if not left:
            break
        out.append(min(length, left))
        left -= out[-1]
    if left:
        raise ValueError(f"the documents have {tokens - left} tokens, fewer than the {tokens} asked for")
    return out
