"""What attention holds in a layer, and how long it takes: from the plans and prices of the documents."""

from dataclasses import dataclass

import numpy as np

from ringattn.mask import Mask
from ringattn.memory.planning.shapes import ModelShape, RunShape, layout_of
from ringattn.parallel.choice.schedule import choose
from ringattn.parallel.machine.machine import Machine
from ringattn.parallel.placement.placement import Placement
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.pricing.memory import exchange_bytes
from ringattn.parallel.pricing.price import Price
from ringattn.parallel.pricing.pricer import Pricer
from ringattn.parallel.pricing.setting import PriceInputs
from ringattn.parallel.schedules.candidates import candidates


@dataclass(frozen=True)
class AttentionUse:
    """One layer's attention on the rank that needs most.

    Arguments:
        forward: bytes in the forward pass, beside q, k, v, out and lse of the rank's tokens.
        backward: bytes in the backward pass, beside q, k, v, out, lse and the gradient of out.
        keys: bytes of cast keys that are kept for the backward pass.
        messages: bytes of the message buffers of copy engines, which all layers share. They are not of torch's
            allocator.
        exchanged: whether heads are, so that q, k, v and out are there twice.
        forward_seconds, backward_seconds: of all layers together.
        told: the schedules.
    """

    forward: int
    backward: int
    keys: int
    messages: int
    exchanged: bool
    forward_seconds: float
    backward_seconds: float
    told: str

    @classmethod
    def of(cls, model: ModelShape, run: RunShape, machine: Machine) -> "AttentionUse":
        """Priced for the documents of a run."""
        if not model.masks:
            return cls(0, 0, 0, 0, run.ulysses > 1, 0.0, 0.0, "none")
        (placement,) = layout_of(model, run, machine).parts
        found = [_Priced.of(placement, mask, model.attention(run.itemsize), machine, run) for mask, _ in model.masks]
        counts = [count for _, count in model.masks]
        return cls(
            forward=max(one.forward for one in found),
            backward=max(one.backward for one in found),
            keys=max(one.keys for one in found),
            messages=max(one.messages for one in found),
            exchanged=run.ulysses > 1,
            forward_seconds=sum(n * one.seconds[0] for n, one in zip(counts, found, strict=True)),
            backward_seconds=sum(n * one.seconds[1] for n, one in zip(counts, found, strict=True)),
            told=found[0].told,
        )


@dataclass(frozen=True)
class _Priced:
    """One mask's attention."""

    forward: int
    backward: int
    keys: int
    messages: int
    seconds: tuple[float, float]
    told: str

    @classmethod
    def of(cls, placement: Placement, mask: Mask, shape: Shape, machine: Machine, run: RunShape) -> "_Priced":
        pricer = Pricer.of(placement, mask, PriceInputs(machine, shape, head_chunks=run.head_chunks))
        choice = choose(pricer, candidates(placement.mesh.ring, "auto", None), None)
        prices = [pricer.price(one, choice.keep_keys)[n] for n, one in enumerate((choice.forward, choice.backward))]
        rows, setting = pricer.demand.rows, pricer.setting
        exchanged = 0
        if setting.exchange is not None:
            exchanged = exchange_bytes(shape, setting.share, rows, -(-rows // setting.ulysses))
        ring = [_most(price, exchanged) for price in prices]
        share, most = setting.share, int(np.max(rows, initial=0))
        there = (0, 0) if setting.exchange is None else _exchange(share, most)
        sums = _kernel_sums(setting.own, most, placement.mesh.ring > 1) if run.kernel_sums else 0
        grads = (share.query_heads * share.head_dim + share.key_row_bytes // share.itemsize) * share.itemsize * most
        return cls(
            forward=ring[0] + there[0],
            backward=ring[1] + there[1] + grads + sums,
            keys=prices[0].kept if choice.keep_keys else 0,
            messages=max(price.messages for price in prices),
            seconds=(choice.cost.forward.seconds, choice.cost.backward.seconds),
            told=choice.forward.name if choice.forward == choice.backward
            else f"{choice.forward.name} forward, {choice.backward.name} backward",
        )  # fmt: skip


def _most(price: Price, exchanged: object) -> int:
    """Bytes of a schedule's buffers, without the exchange of heads around it."""
    return int(np.max(price.bytes - exchanged, initial=0))


def _exchange(share: Shape, rows: int) -> tuple[int, int]:
    """Bytes of an exchange of heads in both passes: q, k, v and out of the rank's heads, of all tokens, and out again
    where it comes back; backward those are what was kept, and the gradient of out is there twice."""
    out = rows * share.query_heads * share.value_dim * share.itemsize
    return rows * share.row_bytes + out, out


def _kernel_sums(own: Shape, rows: int, ring: bool) -> int:
    """What backward kernels add up in float32: gradients of queries, and where query heads share a key head, of keys;
    on a ring the schedule counts the latter. Two numbers of each row and head stand beside them."""
    sums = own.query_heads * (own.head_dim + 2) * own.wide
    if own.query_heads > own.key_heads and not ring:
        sums += own.wide_key_row_bytes
    return rows * sums
