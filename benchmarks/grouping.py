"""How even the packs of a step are, with and without data.delay: python benchmarks/grouping.py

Published document lengths, no tokens. Of all steps together: cost of the dearest packs over that of the average ones.
"""

from datetime import date
from random import Random

import numpy as np

from ringattn.training.data.corpus import Corpus
from ringattn.training.packs.grouping import DocumentCost, GroupedPacker
from ringattn.training.packs.packing import Packer
from ringattn.workloads import HISTOGRAMS

DELAYS = (None, 2, 8, 32)
STEPS = 40
# Tokens whose other work costs as much as one (query, key) pair more for each: Llama 3 8B, 6 × 8.0e9 parameters against
# 3 × 32 layers × 4 × 4096 for a pair, of which a causal document of L tokens has L² / 2.
PER_TOKEN = 6 * 8.0e9 / (3 * 32 * 4 * 4096)


def pairs(length: int) -> float:
    return length * (length + 1) / 2


def main() -> None:
    random = Random(0)
    lengths = [HISTOGRAMS["chatqa"].draw(random) for _ in range(300_000)]
    corpus = Corpus(np.zeros(0, np.uint8), np.cumsum([0, *lengths]), 256, "lengths only")
    attention, step = DocumentCost(pairs), DocumentCost(pairs, PER_TOKEN)
    print(
        f"# Packs of equal cost\n\n{date.today()}, `python benchmarks/grouping.py`. Lengths of `ringattn.workloads` "
        f"(`chatqa`), {STEPS} steps.\n\nCost of the dearest pack of a step over the average one, of all steps "
        "together: attention alone / the whole step of Llama 3 8B.\n"
    )
    print("| tokens a pack | packs a step | stream order | " + " | ".join(f"delay {n}" for n in DELAYS if n) + " |")
    print("|" + "---|" * (2 + len(DELAYS)))
    for seq_len, packs in ((65536, 4), (65536, 8), (65536, 32), (262144, 4), (262144, 8), (1048576, 4)):
        cells = []
        for delay in DELAYS:
            packer = (
                Packer(corpus, seq_len, 0) if delay is None else GroupedPacker(corpus, seq_len, 0, attention, delay)
            )
            plans = [packer.step(packs) for _ in range(STEPS)]
            ratios = []
            for cost in (attention, step):
                costs = [[cost(plan.docs.lengths) for plan in one] for one in plans]
                ratios.append(sum(map(max, costs)) * packs / sum(map(sum, costs)))
            cells.append("{:.3f} / {:.3f}".format(*ratios))
        print(f"| {seq_len} | {packs} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
