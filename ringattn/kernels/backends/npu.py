"""Ascend NPUs: `npu_fusion_attention` of torch_npu in its packed layout "TND".

Tested against fakes only, never on a device. Softcap, dropout and unequal head dims are refused; the operator cannot be
asked for deterministic gradients. What it does with rows without keys is not documented: they are never passed to it.
"""

from collections.abc import Callable
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringattn.kept import kept
from ringattn.kernels.backends.varlen import longest_keys
from ringattn.kernels.probing import parameters, require, why_missing
from ringattn.kernels.spec import Call, Capability, Grads, Options, Range, SavedCall, to_device

MAX_BLOCKS = 2048  # sequences of one launch, as documented
_LANES = 8  # the statistics of a row are repeated this often
_NEEDED = {"atten_mask", "pre_tockens", "next_tockens", "actual_seq_qlen", "actual_seq_kvlen", "sparse_mode"}
_GRAD_NEEDED = _NEEDED | {"softmax_max", "softmax_sum", "attention_in", "scale_value"}


class NpuFusion:
    name = "npu"
    capability = Capability(
        devices=("npu",), dtypes=(torch.float16, torch.bfloat16), max_head_dim=256, head_dim_multiple=16
    )

    def missing(self) -> str | None:
        return why_missing(_kernels)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, options: Options, out: Tensor) -> Tensor:
        forward = _kernels().forward
        packed = _packed_blocks(call, q.device)
        lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=torch.float32)
        if not packed.q_ends:
            out.zero_()
            return lse
        tensors = _take_rows(q, packed.q_rows), _take_rows(k, packed.k_rows), _take_rows(v, packed.k_rows)
        result, high, total, *_ = forward(
            *tensors, q.shape[1], "TND", scale=options.scale, **_band_arguments(call, packed)
        )
        _put_rows(out, result, packed.q_rows)
        part = _rows_of((high + torch.log(total))[..., 0], packed)
        return part if packed.q_rows is None else lse.index_copy_(1, packed.q_rows, part)

    def backward(self, dout: Tensor, saved: SavedCall, grads: Grads) -> None:
        q, k, v, out, lse, call, options = saved
        backward = _kernels().backward
        packed = _packed_blocks(call, q.device)
        if not packed.q_ends:
            for grad in grads:
                grad.zero_()
            return
        q, dout, out = (_take_rows(x, packed.q_rows) for x in (q, dout, out))
        k, v = _take_rows(k, packed.k_rows), _take_rows(v, packed.k_rows)
        seen = lse if packed.q_rows is None else lse.index_select(1, packed.q_rows)
        # The operator wants the largest score of a row and the sum of exponentials: exp(lse) · 1 is the same softmax.
        high = _statistics_of(seen, packed)[..., None].expand(-1, -1, _LANES).contiguous()
        dq, dk, dv, *_ = backward(
            q, k, v, dout, q.shape[1], "TND", softmax_max=high, softmax_sum=torch.ones_like(high), attention_in=out,
            scale_value=options.scale, **_band_arguments(call, packed),
        )  # fmt: skip
        _put_rows(grads.dq, dq, packed.q_rows)
        _put_rows(grads.dk, dk, packed.k_rows)
        _put_rows(grads.dv, dv, packed.k_rows)


class _Packed(NamedTuple):
    """A call's blocks laid end to end, without query rows that see no key and without keys that nobody sees."""

    q_rows: Tensor | None  # (T',) rows of q that are left; None: all
    k_rows: Tensor | None  # (S',)
    q_ends: list[int]  # cumulative lengths, without the leading 0
    k_ends: list[int]
    starts: Tensor  # (T',) first row of the block of each row
    lengths: Tensor  # (T',) rows of the block of each row


def _packed_blocks(call: Call, device: torch.device) -> _Packed:
    """Made once per call and device, as the call's own tensors."""
    return kept(call, ("packed for npu", device), lambda: _pack_blocks(call, device))


def _pack_blocks(call: Call, device: torch.device) -> _Packed:
    q_spans, k_spans = [], []
    for block in call.blocks:
        rows, keys = call.rows_of(block), call.keys_of(block)
        first = rows.start + call.keyless_of(block)
        if first < rows.stop:
            q_spans.append((first, rows.stop))
            k_spans.append((keys.start, keys.stop))
    if len(q_spans) > MAX_BLOCKS:
        raise NotImplementedError(f"backend 'npu' takes up to {MAX_BLOCKS} blocks in a call, got {len(q_spans)}")
    ends = list(accumulate(stop - start for start, stop in q_spans))
    counts = torch.tensor([stop - start for start, stop in q_spans], dtype=torch.int64, device="cpu")
    starts = torch.tensor(ends, dtype=torch.int64, device="cpu") - counts
    return _Packed(
        _row_index(q_spans, call.q[1] - call.q[0], device),
        _row_index(k_spans, call.k[1] - call.k[0], device),
        ends,
        list(accumulate(stop - start for start, stop in k_spans)),
        to_device(starts.repeat_interleave(counts), device),
        to_device(counts.repeat_interleave(counts), device),
    )


def _row_index(spans: list[Range], total: int, device: torch.device) -> Tensor | None:
    """The rows of the spans; None if they are all of `total` rows, which then need no copy."""
    if sum(stop - start for start, stop in spans) == total:
        return None
    return to_device(
        torch.cat([torch.arange(0, device="cpu"), *(torch.arange(*span, device="cpu") for span in spans)]), device
    )


def _take_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


def _put_rows(x: Tensor, part: Tensor, rows: Tensor | None) -> None:
    """`part` into the rows of `x` that it was taken from; 0 elsewhere."""
    if rows is None:
        x.copy_(part)
    else:
        x.zero_().index_copy_(0, rows, part)


def _band_arguments(call: Call, packed: _Packed) -> dict[str, Any]:
    """Lengths and band. Sparse mode 0 is a full mask, 3 causal and 4 a band, the last two aligned to the bottom right
    corner and with one small triangle as mask. The operator spells "token" as `tocken`."""
    named: dict[str, Any] = {"actual_seq_qlen": packed.q_ends, "actual_seq_kvlen": packed.k_ends, "sparse_mode": 0}
    if _kernels().says_layout:
        named["softmax_layout"] = "TND"
    if call.left < 0 and call.right < 0:
        return named
    named |= {"sparse_mode": 3, "atten_mask": _hidden_triangle(packed.starts.device)}
    if call.left >= 0 or call.right > 0:
        widest = longest_keys(call)
        named["sparse_mode"] = 4
        named["pre_tockens"] = call.left if call.left >= 0 else widest
        named["next_tockens"] = call.right if call.right >= 0 else widest
    return named


@cache
def _hidden_triangle(device: torch.device) -> Tensor:
    """True where a key is hidden; the operator asks for this size whatever the lengths are."""
    return torch.ones(2048, 2048, dtype=torch.bool, device=device).triu(1)


def _rows_of(statistics: Tensor, packed: _Packed) -> Tensor:
    """Statistics as the operator lays them out -> (H, T')."""
    if _kernels().says_layout:
        return statistics.T
    return statistics.reshape(-1)[_places_in_memory(packed, statistics.shape[1])]


def _statistics_of(lse: Tensor, packed: _Packed) -> Tensor:
    """(H, T') -> statistics as the operator lays them out, in the shape (T', H)."""
    if _kernels().says_layout:
        return lse.T
    flat = lse.new_empty(lse.numel())
    flat[_places_in_memory(packed, lse.shape[0])] = lse
    return flat.view(lse.shape[1], lse.shape[0])


def _places_in_memory(packed: _Packed, heads: int) -> Tensor:
    """(H, T') places in memory: operators without the argument softmax_layout store (H, n) for one block after another
    under the shape (T', H)."""
    rows = torch.arange(packed.starts.shape[0], device=packed.starts.device)
    head = torch.arange(heads, device=packed.starts.device)[:, None]
    return packed.starts * (heads - 1) + rows + head * packed.lengths


class _Kernels(NamedTuple):
    """The operators of torch_npu."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    says_layout: bool  # whether they take softmax_layout


@cache  # what raises is not kept, so an installation that was repaired is found
def _kernels() -> _Kernels:
    """The operators, or ImportError with what is missing."""
    try:
        import torch_npu  # noqa: F401  # registers the device and the operators
    except Exception as error:  # a CANN library that is missing raises other errors than ImportError
        raise ImportError(f"needs torch_npu, which cannot be imported: {type(error).__name__}: {error}") from error
    forward = getattr(torch.ops.npu, "npu_fusion_attention", None)
    backward = getattr(torch.ops.npu, "npu_fusion_attention_grad", None)
    forward = require(forward, "npu_fusion_attention", _NEEDED | {"scale"})
    backward = require(backward, "npu_fusion_attention_grad", _GRAD_NEEDED)
    return _Kernels(forward, backward, all("softmax_layout" in parameters(kernel) for kernel in (forward, backward)))
