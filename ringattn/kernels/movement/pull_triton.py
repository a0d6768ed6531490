"""Messages out of the memory of peers, as one Triton kernel: for those so short that a copy engine's are not worth the
host's time. Imported only where triton is."""

import triton
import triton.language as tl
from torch import Tensor

from ringattn.kernels.movement.launch import launch

BLOCK = 4096  # numbers of 8 bytes of a program: every thread has 16 loads under way, as the wire is far


def pull(addresses: Tensor, table: Tensor, target: Tensor, start: int, rank: int, longest: int) -> None:
    """Copy a message from every peer.

    Arguments:
        addresses: (peers,) int64: where the memory of each begins, mapped into this process.
        table: (peers, 3) int64, in units of 16 bytes: where the message begins after `start`, where it goes, its size.
        target: flat, of any dtype.
        start: of the messages in the memory of each peer, in units.
        rank: this one's, which begins with itself, so that no peer serves two at a time.
        longest: size of the longest message, in units.
    """
    peers = addresses.shape[0]
    if longest:
        grid = -(-longest * 2 // BLOCK), peers
        launch(_pull, grid, (addresses, table, target.view(-1)), (start, rank), (), (peers, BLOCK))


@triton.jit(do_not_specialize=["start", "rank"])
def _pull(addresses, table, target, start, rank, PEERS: tl.constexpr, BLOCK: tl.constexpr):
    peer = (rank + tl.program_id(1)) % PEERS
    begin = tl.program_id(0) * BLOCK
    size = tl.multiple_of(tl.load(table + peer * 3 + 2) * 2, 2)
    if begin < size:
        there = tl.multiple_of((start + tl.load(table + peer * 3)) * 2, 2)
        here = tl.multiple_of(tl.load(table + peer * 3 + 1) * 2, 2)
        source = tl.multiple_of(tl.load(addresses + peer).to(tl.pointer_type(tl.int64)), 16)
        step = begin + tl.arange(0, BLOCK)
        part = tl.load(source + there + step, mask=step < size)
        tl.store(target.to(tl.pointer_type(tl.int64)) + here + step, part, mask=step < size)
