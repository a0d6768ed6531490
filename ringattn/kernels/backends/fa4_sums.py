"""FlashAttention-4's backward pass with gradients that are added to float32 sums instead of being rounded.

Its kernel adds up dq, and with grouped heads dk and dv, in float32, and rounds them in a last small kernel. Gradients
of several calls or ranks that are rounded before they are added are 1.2 times as wrong as one call's (measured, see
benchmarks/results). So the last step is replaced by ours in a copy of the package's function whose names are looked up
in an extended table; the package itself is not changed. In which order a tile's numbers lie differs by architecture and
variant: it is found by sending numbers through the package's own last step. The self-test decides whether any of this
is used.
"""

import threading
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from ringattn.kernels.spec import Grads, Sum

_LAST_STEP = "_bwd_postprocess_convert"
_DIGIT = 128  # a number of two digits below it is exact in bfloat16

_orders: dict[tuple[Any, ...], Tensor] = {}


def backward_into(interface: ModuleType, grads: Grads, arguments: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
    """The package's backward pass; `arguments` are those before dq, dk and dv.

    Raises RuntimeError if the package's function did not come to its last step for a gradient that has a sum.
    """
    query_heads, key_heads = grads.dq.shape[1], grads.dk.shape[1]
    targets = {"dq": grads.dq, "dk": grads.dk, "dv": grads.dv}
    sums = dict(zip(targets, grads.sums, strict=True))
    later: dict[str, Sum] = {}
    for name in ("dk", "dv"):
        total = sums[name]
        if query_heads == key_heads and total is not None:  # the kernel writes these itself, rounded
            later[name], sums[name] = total, None
            make = torch.empty_like if total.fresh else torch.zeros_like  # rows that no block reads add nothing
            targets[name] = make(targets[name])
    waiting = {id(targets[name]): (targets[name], total) for name, total in sums.items() if total is not None}
    if not waiting:
        interface._flash_attn_bwd(*arguments, **targets, **keywords)
    else:
        _of_thread.waiting = waiting
        try:
            _with_our_last_step(interface)(*arguments, **targets, **keywords)
        finally:
            _of_thread.waiting = {}  # or a call that failed would keep its gradients
    if waiting:
        raise RuntimeError(f"flash-attn-4 has no step {_LAST_STEP} of the expected form")
    for name, total in later.items():
        total.add(targets[name], (0, len(targets[name])), getattr(grads, name))


_of_thread = threading.local()  # `waiting`: outputs and what they are added to, by the output's id
_functions: dict[tuple[Any, Any], FunctionType] = {}


def _with_our_last_step(interface: ModuleType) -> FunctionType:
    """The package's function with other globals; made once, as they are many."""
    original, last_step = interface._flash_attn_bwd, getattr(interface, _LAST_STEP)
    function = _functions.get((original, last_step))
    if function is None:
        names = {**vars(interface), _LAST_STEP: _last_step(last_step)}
        function = FunctionType(original.__code__, names, "backward", original.__defaults__, original.__closure__)
        function.__kwdefaults__ = original.__kwdefaults__
        _functions[original, last_step] = function
    return function


# Arguments of the last step that are of a call: an accumulator's order does not depend on them.
_OF_A_CALL = ("cu_total_m_blocks", "sink_tensors")


def _last_step(original: Callable[..., None]) -> Callable[..., None]:
    """The package's last step, but for outputs that wait: they are added to their sums, and taken out."""
    from ringattn.kernels.backends.fa4_unpack_triton import Lengths, Tiles, unpack_into

    # The arguments and their names are the package's, which passes them in its own way.
    def convert(
        accum: Tensor,
        output: Tensor,
        scale: float,
        cu_seqlens: Tensor,
        seqused: Tensor | None,
        arch: int,
        dtype: Any,
        hdim: int,
        block_size: int,
        *variant: Any,
        **options: Any,
    ) -> None:
        waiting: dict[int, tuple[Tensor, Sum]] = _of_thread.waiting
        if id(output) not in waiting:
            original(
                accum, output, scale, cu_seqlens, seqused, arch, dtype, hdim, block_size, *variant, **options
            )  # fmt: skip
            return
        target, total = waiting.pop(id(output))
        cluster = options.get("cluster_size", 1)
        multiple = options.get("hdim_multiple_of", 32)
        padded = -(-hdim // multiple) * multiple
        for name in _OF_A_CALL:
            options.pop(name, None)
        key = (output.device, arch, output.dtype, hdim, block_size, variant, *options.items())
        order = _orders.get(key)
        if order is None:

            def sample(numbers: Tensor, rows: Tensor) -> None:
                lengths = torch.tensor([0, block_size], dtype=torch.int32, device=rows.device)
                original(numbers, rows, 1.0, lengths, None, arch, dtype, hdim, block_size, *variant, **options)

            order = _orders[key] = _order(sample, block_size, padded, cluster, output)
        tiles = Tiles(order, padded, cluster)
        unpack_into(accum, tiles, Lengths(cu_seqlens, seqused), scale, target, total)

    return convert


def _order(sample: Callable[[Tensor, Tensor], None], tile: int, padded: int, cluster: int, like: Tensor) -> Tensor:
    """Place of each number of a tile of rows inside of the accumulator: (tile, D) int32.

    The accumulator that is sent through the last step holds the places themselves, as two digits: outputs may be
    bfloat16, in which only integers up to 256 are exact.
    """
    size = tile * padded
    assert size <= _DIGIT * 256, "both digits must be exact in half precision"
    places = torch.arange(cluster * size, device=like.device)
    digits = []
    for digit in (places % _DIGIT, places // _DIGIT % 256):
        rows = like.new_zeros(tile, 1, like.shape[2])
        sample(digit.float()[None], rows)
        digits.append(rows[:, 0].int())
    return (digits[0] + _DIGIT * digits[1]).contiguous()
