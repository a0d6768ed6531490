"""Tile sizes of FlexAttention's Triton kernel: the sensible ones that fit a device's shared memory.

Key and value tiles are loaded in a pipeline of `stages`, the query tile stays: that many bytes the device must grant
one thread block. The limit is the device's own, not a constant.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ringattn.environment import SHARED_MEMORY_KIB
from ringattn.kernels.spec import CallSpec
from ringattn.kernels.tuning.tuner import bucket

MOST = 18  # candidates measured for one shape


@dataclass(frozen=True)
class Tile:
    """Query rows and key rows of a tile, pipeline stages, warps."""

    block_q: int
    block_k: int
    stages: int
    warps: int

    def shared_memory(self, head_dim: int, value_dim: int, itemsize: int) -> int:
        """Bytes that the forward kernel needs: the query tile, and `stages` key and value tiles."""
        dims = [max(16, 1 << (dim - 1).bit_length()) for dim in (head_dim, value_dim)]
        return (self.block_q * dims[0] + self.stages * self.block_k * sum(dims)) * itemsize

    def choice(self) -> dict[str, int]:
        """As JSON; `Tile(**choice)` is the way back."""
        return asdict(self)

    def kernel_options(self) -> dict[str, int]:
        """FlexAttention's names. The backward kernels hold four tensors instead of three: half the rows."""
        inner, outer = (max(16, block // 2) for block in sorted((self.block_q, self.block_k)))
        options = {"fwd_BLOCK_M": self.block_q, "fwd_BLOCK_N": self.block_k}
        options |= {"bwd_BLOCK_M1": inner, "bwd_BLOCK_N1": outer, "bwd_BLOCK_M2": outer, "bwd_BLOCK_N2": inner}
        return options | {"num_stages": self.stages, "num_warps": self.warps}


_BLOCKS = ((128, 128), (128, 64), (64, 128), (64, 64), (128, 32), (64, 32), (32, 64), (32, 32), (16, 16))
# Preferred first: large tiles feed the tensor cores, deep pipelines hide the loads.
_TILES = tuple(
    Tile(block_q, block_k, stages, 8 if block_q * block_k > 8192 else 4)
    for block_q, block_k in _BLOCKS
    for stages in (3, 2, 1)
)


def shared_memory_limit(properties: Any) -> int:
    """Bytes of shared memory that a kernel may take on a device (`torch.cuda.get_device_properties`).

    RINGATTN_SHARED_MEMORY_KIB lowers it and cannot raise it.
    """
    own = int(getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block)
    text = SHARED_MEMORY_KIB.read()
    if text is None:
        return own
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{SHARED_MEMORY_KIB.name} must be an integer >= 1, got {text!r}")
    return min(own, int(text) * 1024)


def tiles(head_dim: int, value_dim: int, itemsize: int, limit: int, longest: int) -> list[Tile]:
    """Tiles that fit `limit` bytes and are not longer than the documents, preferred ones first; maybe none."""
    rows = max(16, bucket(longest))
    fitting = [tile for tile in _TILES if tile.shared_memory(head_dim, value_dim, itemsize) <= limit]
    short = [tile for tile in fitting if max(tile.block_q, tile.block_k) <= rows]
    return (short or fitting[-1:])[:MOST]


def tiles_here(spec: CallSpec, longest: int) -> list[Tile]:
    """Candidates on this process' device; none where it is no CUDA device."""
    if spec.device != "cuda":
        return []
    limit = shared_memory_limit(torch.cuda.get_device_properties())
    return tiles(spec.head_dim, spec.value_dim, spec.dtype.itemsize, limit, longest)
