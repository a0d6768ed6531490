"""What attention gave, for callers that compute layers again in the backward pass: attention is computed once.

A checkpoint around a layer keeps the layer's input and computes all the rest again. Attention is the dear part at long
lengths, and its output is no larger than the input: with `Recall` it is kept too, with its log-sum-exp, and the second
pass takes it from there. No kernel runs and no keys travel again. An exchange of heads does travel again, since what it
moves is computed again.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ringattn.parallel.execution.job import Job

_here = threading.local()  # autograd runs the second pass on a thread of its own


class Results(NamedTuple):
    """What the stages of one part computed, for one group of heads."""

    out: Tensor  # (n, H, V)
    lse: Tensor  # (H, n)
    kept: Sequence[Tensor]  # cast keys and values


class Attended:
    """One attention, while it is noted or taken from what was noted.

    Arguments:
        noted: what stands for the results by part (its rows) and group of heads; filled while it is noted.
    """

    def __init__(self, recall: "Recall", noted: dict[Any, Any], replays: bool) -> None:
        self._recall, self._noted, self.replays = recall, noted, replays
        self._results: dict[Any, Results] = {}

    def known(self, part: Any) -> Results:
        """The results of a part again. Raises RuntimeError if the output was changed in place meanwhile."""
        if part not in self._results:
            (out, version), lse, kept = self._noted[part]
            if isinstance(out, Tensor) and out._version != version:
                raise RuntimeError(
                    "attention's output was changed in place after it was kept for the backward pass: let the model "
                    "make a new tensor of it, or keep layers without attention"
                )
            unpack = self._recall.unpack
            self._results[part] = Results(unpack(out).detach(), unpack(lse), [unpack(one) for one in kept])
        return self._results[part]

    def note(self, part: Any, results: Results) -> None:
        """Keeps the results of a part."""
        pack = self._recall.pack
        out = pack(results.out.detach())
        self._noted[part] = [(out, 0), pack(results.lse), [pack(one) for one in results.kept]]

    def end(self) -> None:
        """All parts are written: from here on an output that changes is somebody else's doing."""
        for results in self._noted.values():
            out, _ = results[0]
            results[0] = out, out._version if isinstance(out, Tensor) else 0


class Recall:
    """The attentions of one piece of code, in the order of their calls.

        recall = Recall()
        out = checkpoint(layer, x, use_reentrant=False, context_fn=recall.contexts)

    Arguments:
        pack, unpack: what stands for a tensor meanwhile, and the tensor again, as of
            `torch.autograd.graph.saved_tensors_hooks`.
    """

    def __init__(
        self,
        pack: Callable[[Tensor], Any] = lambda x: x,
        unpack: Callable[[Any], Tensor] = lambda x: x,
    ) -> None:
        self.pack, self.unpack = pack, unpack
        self._calls: list[tuple[list[tuple[Any, Any]], dict[Any, Any]]] = []

    def contexts(self) -> "tuple[_Region, _Region]":
        """Inside of the first attentions are computed and noted, inside of the second they are what was noted."""
        self._calls = []
        return _Region(self, replays=False), _Region(self, replays=True)

    def call(self, number: int, replays: bool, jobs: Sequence[Job]) -> Attended:
        """The attention that is called as number so many of the region.

        Raises RuntimeError if it is not the one that was called there at first: its results would be another's.
        """
        kind = [(job.plan, job.dropout) for job in jobs]
        if not replays:
            self._calls.append((kind, {}))
        elif number >= len(self._calls) or not _same(self._calls[number][0], kind):
            raise RuntimeError(
                f"attention {number + 1} of a layer is another one where the layer is computed again than it was at "
                f"first, when there were {len(self._calls)}: a layer whose attention is kept must do the same twice"
            )
        return Attended(self, self._calls[number][1], replays)


def _same(kind: Sequence[tuple[Any, Any]], other: Sequence[tuple[Any, Any]]) -> bool:
    """Whether the plans, which a layout keeps for one kind of call, are the very same, and the draws are equal."""
    return len(kind) == len(other) and all(a is b and c == d for (a, c), (b, d) in zip(kind, other, strict=True))


class _Region:
    """A context in which attentions belong to a `Recall`; it may be entered again, as for a graph that is retained."""

    def __init__(self, recall: Recall, replays: bool) -> None:
        self.recall, self.replays, self.calls = recall, replays, 0
        self._outside: list[_Region | None] = []

    def __enter__(self) -> None:
        self._outside.append(getattr(_here, "region", None))
        _here.region, self.calls = self, 0

    def __exit__(self, *_: Any) -> None:
        _here.region = self._outside.pop()


def attention_begins(jobs: Sequence[Job]) -> Attended | None:
    """The attention of these jobs, which begins now, if it is in a region of a `Recall`."""
    region: _Region | None = getattr(_here, "region", None)
    if region is None:
        return None
    region.calls += 1
    return region.recall.call(region.calls - 1, region.replays, jobs)
