"""Which keys a query may attend to inside its document, as a band of `k - q` and a chunk length."""

from dataclasses import dataclass

import torch

Bound = int | None  # None: open


@dataclass(frozen=True)
class Band:
    """Allowed `k - q` in document positions: `lo <= k - q <= hi`; None is an open end."""

    lo: Bound
    hi: Bound

    def keys_of(self, start: int, stop: int, length: int) -> tuple[int, int]:
        """The range of keys that at least one query of `[start, stop)` sees in a document of `length`."""
        if start >= stop:
            return start, start
        lo = 0 if self.lo is None else max(0, start + self.lo)
        hi = length if self.hi is None else min(length, stop + self.hi)
        return lo, hi

    def area(self, start: int, stop: int, length: int) -> int:
        """Number of allowed (query, key) pairs of the queries `[start, stop)` of a document of `length`."""
        # Sum over q of min(length, q + hi + 1) minus sum over q of max(0, q + lo). Each query sees itself, so no
        # query has a negative count.
        if self.hi is None:
            upper = (stop - start) * length
        else:
            upper = _sum_of_min(start + self.hi + 1, stop + self.hi + 1, length)
        lower = 0 if self.lo is None else _sum_of_max0(start + self.lo, stop + self.lo)
        return upper - lower


def _sum_of_min(start: int, stop: int, cap: int) -> int:
    """Sum of min(x, cap) over x in [start, stop)."""
    split = min(max(start, cap), stop)
    return (start + split - 1) * (split - start) // 2 + (stop - split) * cap


def _sum_of_max0(start: int, stop: int) -> int:
    """Sum of max(x, 0) over x in [start, stop)."""
    start, stop = max(start, 0), max(stop, 0)
    return (start + stop - 1) * (stop - start) // 2


@dataclass(frozen=True)
class Mask:
    """The attention pattern inside every document.

    Arguments:
        causal: a query sees no key after itself.
        window: `(left, right)`, inclusive, counted inside the document as in FlashAttention: query q sees keys
            `q - left ... q + right`; -1 is open. In other systems' words: `sliding_window=W` of transformers is
            `(W - 1, 0)`, and `(W - 1, W - 1)` where it is not causal; `sliding_window=w` of ejkernel is `(w, 0)`, or
            `(w, w)` where it is not causal. `(0, 0)` is the query alone, never "no window".
        chunk: cut each document in sub-documents of this many tokens for attention only (Llama 4); None: whole.
        blocks: of documents with blocks of tokens that see each other (`Documents(blocks=...)`), what a window does to
            them: "whole" (a block sees itself whole, and of the rest what the window leaves) or "clipped" (the window's
            left edge cuts blocks too, as in Gemma 3 and 4). Without a window they are the same. "ignored": these layers
            know of no blocks (full attention of Gemma 4).

    Raises ValueError for a window that is not a pair of integers >= -1, a chunk below 1, or other `blocks`.
    """

    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    chunk: int | None = None
    blocks: str = "whole"

    def __post_init__(self) -> None:
        window = self.window
        if isinstance(window, list):
            window = tuple(window)
        pair = isinstance(window, tuple) and len(window) == 2
        if not pair or not all(isinstance(w, int) and not isinstance(w, bool) and w >= -1 for w in window):
            raise ValueError(
                f"window must be a pair (left, right) of integers >= -1 (-1 is open), got {self.window!r}; "
                "a sliding window of W tokens that counts the query itself is (W - 1, 0)"
            )
        object.__setattr__(self, "window", window)
        chunk = self.chunk
        if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
            raise ValueError(f"chunk must be None or an integer >= 1, got {chunk!r}")
        if not isinstance(self.causal, bool):
            raise ValueError(f"causal must be True or False, got {self.causal!r}")
        if self.blocks not in ("whole", "clipped", "ignored"):
            raise ValueError(f'blocks must be "whole", "clipped" or "ignored", got {self.blocks!r}')

    @property
    def band(self) -> Band:
        left, right = self.window
        lo = None if left < 0 else -left
        hi = None if right < 0 else right
        if self.causal:
            hi = 0
        return Band(lo, hi)

    def dense(
        self, length: int, positions: torch.Tensor | None = None, block: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Brute force: the (length, length) boolean matrix [query, key] of one document. For tests and pictures.

        Arguments:
            positions: (length,) of the tokens, which a tree does not count by ones; who is on whose path is not asked.
            block: (length,) a number for each block of tokens that see each other, negative outside of them.
        """
        place = torch.arange(length, device="cpu") if positions is None else positions
        q, k = place[:, None], place[None, :]
        allowed = torch.ones(length, length, dtype=torch.bool, device="cpu")
        left, right = self.window
        if self.causal:
            allowed &= k <= q
        together = torch.zeros_like(allowed) if block is None else (block[:, None] == block) & (block >= 0)
        if self.blocks == "clipped":
            allowed |= together
        if left >= 0:
            allowed &= k >= q - left
        if right >= 0 and not self.causal:
            allowed &= k <= q + right
        if self.chunk is not None:
            allowed &= q // self.chunk == k // self.chunk
        return allowed | together if self.blocks == "whole" else allowed

    def __str__(self) -> str:
        words = ["causal" if self.causal else "bidirectional"]
        if self.window != (-1, -1):
            words.append(f"window {self.window[0]},{self.window[1]}")
        if self.chunk is not None:
            words.append(f"chunk {self.chunk}")
        if self.blocks != "whole":
            words.append(f"blocks {self.blocks}")
        return " ".join(words)
