"""A trie of token sequences whose nodes are runs of tokens: integers only."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Segment:
    """A run of tokens that the same sequences share, apart from those that end in it.

    Arguments:
        sequence: number of one sequence that goes through it.
        start, stop: which tokens of that sequence the run holds.
        parent: number of the segment that it follows, -1 for a root.
    """

    sequence: int
    start: int
    stop: int
    parent: int


@dataclass(frozen=True)
class Trie:
    """Segments in depth-first order, children in the order in which sequences come, and each sequence's way.

    Arguments:
        segments: parents before children; all below a root follow it.
        paths: for every sequence the numbers of its segments from the root on. It may end inside of the last one.
    """

    segments: tuple[Segment, ...]
    paths: tuple[tuple[int, ...], ...]


@dataclass(eq=False)
class _Run:
    """A node while the trie grows: tokens [start, stop) of a sequence, and the runs that follow by first token."""

    sequence: int
    start: int
    stop: int
    children: dict[int, "_Run"] = field(default_factory=dict)
    number: int | None = None  # None: dissolved in its children


def grow(sequences: Sequence[Tokens], min_shared: int) -> Trie:
    """The trie of some sequences. Runs are maximal: two sequences share every token of a common prefix.

    Arguments:
        min_shared: a run that others follow has at least so many tokens. Shorter ones are not shared: each run that
            follows has a copy of them in front.
    """
    roots: dict[int, _Run] = {}
    for number in range(len(sequences)):
        _insert(roots, sequences, number)
    segments = _numbered(roots, min_shared)
    return Trie(segments, tuple(_path(roots, tokens) for tokens in sequences))


def _insert(runs: dict[int, _Run], sequences: Sequence[Tokens], number: int) -> None:
    tokens, at, run = sequences[number], 0, None
    while at < len(tokens):
        if run is not None and not runs:  # a sequence ended here, and this one goes on
            run.sequence, run.stop = number, len(tokens)
            return
        run = runs.get(int(tokens[at]))
        if run is None:
            runs[int(tokens[at])] = _Run(number, at, len(tokens))
            return
        at += _common(sequences[run.sequence][run.start : run.stop], tokens[at:])
        if at < min(run.stop, len(tokens)):
            rest = _Run(run.sequence, at, run.stop, run.children)
            run.stop, run.children = at, {int(sequences[run.sequence][at]): rest}
        runs = run.children


def _common(a: Tokens, b: Tokens) -> int:
    """Tokens of the longest common prefix."""
    size = min(len(a), len(b))
    differ = a[:size] != b[:size]
    return int(differ.argmax()) if differ.any() else size


def _numbered(roots: dict[int, _Run], min_shared: int) -> tuple[Segment, ...]:
    """The runs in depth-first order, those that are too short to be shared dissolved in their children."""
    segments: list[Segment] = []
    left = [(run, -1) for run in reversed(roots.values())]
    while left:
        run, parent = left.pop()
        if run.children and run.stop - run.start < min_shared:
            # The sequence that a child is taken from has the same tokens in front.
            for child in run.children.values():
                child.start = run.start
        else:
            run.number = len(segments)
            segments.append(Segment(run.sequence, run.start, run.stop, parent))
            parent = run.number
        left += [(child, parent) for child in reversed(run.children.values())]
    return tuple(segments)


def _path(runs: dict[int, _Run], tokens: Tokens) -> tuple[int, ...]:
    """The segments of a sequence; one that ends in a dissolved run has its tokens in the first child's copy."""
    path: list[int] = []
    at, run = 0, None
    while at < len(tokens):
        run = runs[int(tokens[at])]
        at, runs = run.stop, run.children
        if run.number is not None:
            path.append(run.number)
    while run is not None and run.number is None:
        run = next(iter(run.children.values()))
        if run.number is not None:
            path.append(run.number)
    return tuple(path)


def tokens_of(values: Any, name: str) -> Tokens:
    """A sequence of token ids as an array. Raises ValueError naming it for anything but integers >= 0 in one row."""
    try:
        array = values.numpy(force=True) if isinstance(values, torch.Tensor) else np.asarray(values)
    except (TypeError, ValueError, OverflowError):  # ragged, or beyond every integer
        array = np.asarray(None)
    if array.ndim == 1 and array.size == 0:
        return np.zeros(0, np.int64)  # an empty list becomes an array of floats
    mixed = isinstance(values, Sequence) and bool in set(map(type, values))  # which Python counts as 0 and 1
    if array.ndim != 1 or array.dtype.kind not in "iu" or mixed:
        raise ValueError(f"{name} must be token ids in one row, got {_shown(values)}")
    if array.min() < 0 or array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} must be token ids >= 0, got {int(array.min() if array.min() < 0 else array.max())}")
    return array.astype(np.int64)


def _shown(values: Any) -> str:
    if isinstance(values, torch.Tensor | np.ndarray):
        return f"{tuple(values.shape)} of {values.dtype}"
    text = repr(values)
    return text if len(text) <= 80 else f"{text[:77]}..."
