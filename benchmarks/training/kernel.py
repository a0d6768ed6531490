"""The kernel of all rows: a backend that counts its calls, and that can be dry.

Dry, it allocates what the real kernel allocates and writes zeros. Memory is then that of a real step, in the time of
everything but attention: lengths whose real step takes minutes can be tried. What each kernel allocates was read in its
source; rows of both kinds at one length show that peaks agree.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ringattn.kernels import registry
from ringattn.kernels.selftest import adds
from ringattn.kernels.spec import Backend, Call, CallSpec, Grads, Options, SavedCall

TILE = 128  # rows that kernels round each block up to, on average half of it too much
# FlashAttention 2 has no sums for heads that share keys: a gradient for every query head, added up afterwards.
EXPANDING = ("fa2", "torch")


class Counts(NamedTuple):
    """Calls of the kernel."""

    forward: int = 0
    backward: int = 0


class MeasuredKernel:
    """A backend under a name of its own, which does what `real` does unless it is dry.

    `counts` are its calls since they were set. Its self-test is the real one's, before it is ever dry.
    """

    def __init__(self, real: Backend) -> None:
        self.real, self.name, self.capability = real, f"{real.name}, measured", real.capability
        self.is_dry, self.counts = False, Counts()

    def missing(self) -> str | None:
        return self.real.missing()

    @contextmanager
    def dry(self, wanted: bool = True) -> Iterator[None]:
        """Inside, attention is zeros."""
        self.is_dry = wanted
        try:
            yield
        finally:
            self.is_dry = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, options: Options, out: Tensor) -> Tensor:
        self.counts = self.counts._replace(forward=self.counts.forward + 1)
        if not self.is_dry:
            return self.real.forward(q, k, v, call, options, out)
        held = [q.new_empty(shape, dtype=dtype) for shape, dtype in forward_buffers(self.real.name, q, v)]
        lse = q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32)
        out.zero_()
        del held
        return lse

    def backward(self, dout: Tensor, saved: SavedCall, grads: Grads) -> None:
        self.counts = self.counts._replace(backward=self.counts.backward + 1)
        if not self.is_dry:
            self.real.backward(dout, saved, grads)
            return
        shapes = backward_buffers(self.real.name, saved)
        held = [saved.q.new_empty(shape, dtype=dtype) for shape, dtype in shapes]
        for target, total in zip(grads.tensors, grads.sums, strict=True):
            target.zero_()
            if total is not None and total.fresh:
                total.wide.zero_()
        del held


Buffer = tuple[tuple[int, ...], torch.dtype]


def forward_buffers(name: str, q: Tensor, v: Tensor) -> list[Buffer]:
    """What the kernel of this name allocates in its forward pass beside its lse: q (T, H, D), v (S, K, V)."""
    return [((*q.shape[:2], v.shape[2]), q.dtype)] if name in EXPANDING else []


def backward_buffers(name: str, saved: SavedCall) -> list[Buffer]:
    """What it allocates in its backward pass: sums of dq in float32, two numbers a row, and what shared keys need."""
    q, k, v, call = saved.q, saved.k, saved.v, saved.call
    blocks, wide = len(call.blocks), torch.float32
    rows, keys = len(q) + blocks * TILE, len(k) + blocks * TILE
    found: list[Buffer] = [((q.shape[1], rows, q.shape[2]), wide), ((2, q.shape[1], rows), wide)]
    shared = q.shape[1] != k.shape[1]
    if name in EXPANDING:  # results of its own, that are copied
        found += [(tuple(x.shape), x.dtype) for x in (q, k, v)]
        if shared:
            found += [((len(k), q.shape[1], x.shape[2]), x.dtype) for x in (k, v)]
    elif shared:
        found += [((k.shape[1], keys, x.shape[2]), wide) for x in (k, v)]
    return found


@contextmanager
def measured_kernel(spec: CallSpec, name: str = "auto") -> Iterator[MeasuredKernel]:
    """The kernel that `choose(spec, name)` gives, in the registry under its own name while this lasts.

    Raises what `choose` raises.
    """
    kernel = MeasuredKernel(registry.choose(spec, name))
    known = registry.backends()
    known[kernel.name] = kernel
    try:
        registry.choose(spec, kernel.name)  # runs the self-tests now: a dry kernel would not pass them
        adds(kernel, spec)
        yield kernel
    finally:
        del known[kernel.name]
        registry._chosen.cache_clear()
