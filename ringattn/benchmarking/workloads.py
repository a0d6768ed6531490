"""What is computed: packs of documents by name, the same for the same name and seed."""

import re
from dataclasses import dataclass

from ringattn.documents import Documents
from ringattn.mask import Mask
from ringattn.workloads import HISTOGRAMS

# Mostly one long document, with a tail of ever shorter ones: tokens of a stream of 256K.
PACKED = (131072, *(32768,) * 2, *(16384,) * 2, *(8192,) * 2, *(4096,) * 2, *(2048,) * 2, *(1024,) * 3, *(512,) * 2)
SHORT = (*(4096,) * 32, *(8192,) * 8, *(16384,) * 4)
WINDOW = 4096
KINDS = "dense, packed, short, hist, window"


@dataclass(frozen=True)
class Workload:
    name: str
    docs: Documents
    mask: Mask

    def pairs(self) -> int:
        """Pairs of query and key that one head computes."""
        left = self.mask.window[0]
        width = self.docs.total if left < 0 else left + 1
        full = (min(length, width) for length in self.docs.lengths)
        return sum(
            short * (short + 1) // 2 + (length - short) * width
            for length, short in zip(self.docs.lengths, full, strict=True)
        )


def workload(name: str, seed: int) -> Workload:
    """A workload of `<kind><tokens>`, the tokens as a number or with k for 1,024: dense256k, hist64k, window65536.

    dense: one document. packed: half the stream one document, then ever shorter ones. short: three fixed lengths, 4K to
    16K at 256K tokens. hist: drawn from the published histogram, none longer than a quarter of the stream. window: one
    document with a causal window of 4,096. packed and short are scaled from their 256K tokens.

    Raises ValueError for another name.
    """
    found = re.fullmatch(r"(dense|packed|short|hist|window)(\d+)(k?)", name.lower())
    if found is None or not int(found[2]):
        raise ValueError(f"a workload is one of {KINDS} with a number of tokens, as in hist256k, got {name!r}")
    kind, tokens = found[1], int(found[2]) * (1024 if found[3] else 1)
    mask = Mask(window=(WINDOW - 1, 0)) if kind == "window" else Mask()
    if kind in ("dense", "window"):
        lengths = [tokens]
    elif kind == "hist":
        lengths = HISTOGRAMS["chatqa"].pack(tokens, seed, longest=max(1, tokens // 4))
    else:
        lengths = [max(1, length * tokens // 2**18) for length in (PACKED if kind == "packed" else SHORT)]
        lengths.append(max(0, tokens - sum(lengths)))
    return Workload(name, Documents(lengths), mask)
