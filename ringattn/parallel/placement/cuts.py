"""How the tokens of one document are cut among the ring positions that share it."""

from collections.abc import Callable

import numpy as np

from ringattn.parallel.geometry.block_table import Floats, Ints

Owner = tuple[int, int]  # a position, and how many tokens it has of the document
Cut = tuple[int, int, int]  # a position, and its tokens `[first, last)` of the document


def nested(size: int, owners: list[Owner], tile: int) -> list[Cut]:
    """Nested heads and tails of one document, the largest share outermost."""
    pieces = []
    first, last = 0, size
    order = sorted(owners, key=lambda share: (-share[1], share[0]))
    for position, tokens in order[:-1]:
        head = (tokens + tile) // (2 * tile) * tile  # half of the share, to the nearest tile
        pieces += [(position, first, first + head), (position, last - (tokens - head), last)]
        first, last = first + head, last - (tokens - head)
    pieces += [(position, first, last) for position, _ in order[-1:]]
    return [piece for piece in pieces if piece[1] < piece[2]]


def nested_by_cost(size: int, owners: list[Owner], tile: int, before: Callable[[Ints], Floats]) -> list[Cut]:
    """Nested heads and tails as of `nested`, each head as long as it makes the share cost its part.

    For documents whose cost per token does not grow evenly. Under a causal window, say, the first tokens cost less than
    all others, which cost the same: a share that is all tail costs too much, and one that is all head too little.

    Arguments:
        before: the cost of the tokens before each of some places.
    """
    pieces = []
    mean = float(before(np.array([size]))[0]) / size
    first, last = 0, size
    order = sorted(owners, key=lambda share: (-share[1], share[0]))
    for position, tokens in order[:-1]:
        heads = np.append(np.arange(0, tokens, tile), tokens)
        inside = before(last - tokens + heads) - before(first + heads)  # of what each head leaves to the others
        start, end = before(np.array([first, last])).tolist()
        head = int(heads[np.abs(end - start - inside - tokens * mean).argmin()])
        pieces += [(position, first, first + head), (position, last - (tokens - head), last)]
        first, last = first + head, last - (tokens - head)
    pieces += [(position, first, last) for position, _ in order[-1:]]
    return [piece for piece in pieces if piece[1] < piece[2]]


def consecutive(owners: list[Owner]) -> list[Cut]:
    """Consecutive runs of one document in the order of positions."""
    pieces = []
    first = 0
    for position, tokens in sorted(owners):
        pieces.append((position, first, first + tokens))
        first += tokens
    return pieces
