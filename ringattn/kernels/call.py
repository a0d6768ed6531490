"""One variable-length kernel launch, as integers: which query rows see which key rows.

Rows are counted in the tensors that a plan's stage works on; a kernel gets the rows of one call only.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch

from ringattn.kept import kept, kept_already

Range = tuple[int, int]


@dataclass(frozen=True)
class Block:
    """Query rows over key rows under one band; `left` and `right` are aligned to the bottom right corner.

    With n queries and m keys, query i sees the keys `i + m - n - left ... i + m - n + right`; -1 is open.
    """

    q: Range
    k: Range
    left: int = -1
    right: int = -1

    @property
    def lengths(self) -> tuple[int, int]:
        """How many queries, and how many keys."""
        return self.q[1] - self.q[0], self.k[1] - self.k[0]


@dataclass(frozen=True)
class Call:
    """One variable-length kernel launch: blocks whose query rows follow one another and whose keys never overlap.

    `q` and `k` are the rows of a stage's tensors that the blocks span together, and a kernel is given these rows only.
    The blocks' queries tile `q` exactly. Their keys ascend inside `k`, perhaps with rows between them that no block
    reads. All blocks have one band, as a launch takes one: the call's `left` and `right`, not those of its blocks, are
    what a kernel obeys.
    """

    blocks: tuple[Block, ...]
    left: int = -1
    right: int = -1

    @cached_property
    def q(self) -> Range:
        return self.blocks[0].q[0], self.blocks[-1].q[1]

    @cached_property
    def k(self) -> Range:
        return self.blocks[0].k[0], self.blocks[-1].k[1]

    @cached_property
    def q_lens(self) -> tuple[int, ...]:
        return tuple(block.q[1] - block.q[0] for block in self.blocks)

    @cached_property
    def k_lens(self) -> tuple[int, ...]:
        return tuple(block.k[1] - block.k[0] for block in self.blocks)

    @cached_property
    def k_starts(self) -> tuple[int, ...]:
        """First key row of each block, counted from `k[0]`."""
        return tuple(block.k[0] - self.k[0] for block in self.blocks)

    @cached_property
    def max_q(self) -> int:
        return max(self.q_lens)

    @cached_property
    def max_k(self) -> int:
        return max(self.k_lens)

    @cached_property
    def dense_keys(self) -> bool:
        """Whether the blocks' keys tile `k` exactly, so that cumulative lengths describe them."""
        return self.k_starts == (0, *accumulate(self.k_lens))[:-1]

    @cached_property
    def keyless_rows(self) -> bool:
        """Whether the band leaves some query row without a key."""
        return any(self.keyless_of(block) for block in self.blocks)

    def keyless_of(self, block: Block) -> int:
        """How many query rows of a block see no key: its first ones, as the band is aligned to the bottom right."""
        n, m = block.lengths
        if not m:
            return n
        return min(n, max(0, n - m - self.right)) if self.right >= 0 else 0

    def rows_of(self, block: Block) -> slice:
        """Where a block's queries are in the tensor q of this call."""
        return slice(block.q[0] - self.q[0], block.q[1] - self.q[0])

    def keys_of(self, block: Block) -> slice:
        """Where a block's keys are in the tensors k and v of this call."""
        return slice(block.k[0] - self.k[0], block.k[1] - self.k[0])

    @cached_property
    def key_runs(self) -> tuple[Range, ...]:
        """The keys that blocks read, as few ranges as there are."""
        runs: list[Range] = []
        for block in self.blocks:
            if block.k[0] == block.k[1]:
                continue
            if runs and runs[-1][1] == block.k[0]:
                runs[-1] = (runs[-1][0], block.k[1])
            else:
                runs.append(block.k)
        return tuple(runs)

    def tensors(self, device: torch.device) -> "CallTensors":
        """The lengths as int32 tensors on `device`, made once: a plan serves every layer of a step."""

        def make() -> CallTensors:
            return CallTensors(
                _int32((0, *accumulate(self.q_lens)), device),
                _int32((0, *accumulate(self.k_lens)), device),
                _int32((*self.k_starts, self.k[1] - self.k[0]), device),
                _int32(self.k_lens, device),
            )

        return kept(self, ("tensors", device), make)

    def packed_key_rows(self, device: torch.device) -> torch.Tensor:
        """Rows of `k` that the blocks read, in order: (sum of k_lens,) int64; made once as well."""
        key = "packed key rows", device
        found: torch.Tensor | None = kept_already(self, key)
        return kept(self, key, lambda: to_device(self._packed_rows(), device)) if found is None else found

    def _packed_rows(self) -> torch.Tensor:
        first = self.k[0]
        return torch.cat([torch.arange(start - first, stop - first, device="cpu") for start, stop in self.key_runs])


class CallTensors(NamedTuple):
    """Lengths of a call of B blocks, int32 on a device."""

    cu_q: torch.Tensor  # (B + 1,) cumulative query lengths
    cu_k: torch.Tensor  # (B + 1,) cumulative key lengths, keys laid end to end
    k_offsets: torch.Tensor  # (B + 1,) first key row of each block in place, then the end
    k_lens: torch.Tensor  # (B,)


def _int32(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return to_device(torch.tensor(values, dtype=torch.int32, device="cpu"), device)


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on `device`, without waiting for it."""
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)  # a pageable copy would wait for the stream
