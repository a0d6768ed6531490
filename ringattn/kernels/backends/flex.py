"""FlexAttention (torch, Triton): any signature that no flash kernel takes, at the price of compiling at first use.

A call's documents and band become two numbers per query row, the first and the last key that it sees. They are the
whole mask: of the elements, and of the tiles that the kernel visits.

FlexAttention's backward knows the softmax of its own call only. A call's part of a larger softmax is out_p, lse_p, and
its weight there is w = exp(lse_p - lse), so that out = Σ w out_p; its gradients are those of out_p and lse_p for the
cotangents w dout and w dout · (out_p - out). `backward` therefore runs the forward once more: 7 matrix products, not 5.

Dropout happens after the softmax, where no score_mod reaches. But dropping scores gives out_d and lse_d of the softmax
over the pairs that are kept, and exp(lse_d - lse) out_d / (1 - p) is what dropout makes of the softmax over all pairs,
whose lse a second attention gives. Both are differentiated, so it is exact in both directions, at twice the price.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringattn.kept import kept
from ringattn.kernels.backends.reference import is_kept, row_hashes
from ringattn.kernels.backends.rows import as_batch, from_batch
from ringattn.kernels.merge import finite_lse
from ringattn.kernels.spec import Call, Capability, Dropout, Grads, Options, SavedCall, accumulation_dtype, to_device

Attend = Callable[..., tuple[Tensor, Tensor]]  # (block mask, q, k, v, and with dropout `_hashes`) -> out, lse
# Compiled variants of one process: head dims, heads, dtypes, with and without gradients, lengths of 1, scales and caps.
# Beyond it torch raises; it would otherwise fall back to a kernel that holds all scores in memory.
VARIANTS = 256
# The kernels multiply rows of keys, and in the backward pass rows of queries, by their stride in int32, and say nothing
# where that overflows (torch 2.11 to 2.13: rows counted from block indices in _inductor/kernel/flex/templates).
COUNTED = 2**31


class FlexAttention:
    """FlexAttention as a backend.

    Arguments:
        block_size: rows of queries and of keys in a tile of the mask; the kernel's own blocks must divide them.
        kernel_options: of the Triton kernel: BLOCK_M, BLOCK_N (forward), BLOCK_M1, BLOCK_N1, BLOCK_M2, BLOCK_N2
            (backward), num_warps, num_stages, ... as `torch.nn.attention.flex_attention.FlexKernelOptions` lists them.
            What is left out is torch's choice.
        eager: plain torch instead of the compiled kernel, on any device: it holds all scores, and is for tests.
    """

    name = "flex"
    capability = Capability(
        devices=("cuda",),
        dtypes=(torch.float16, torch.bfloat16, torch.float32),
        compute_capability=((8, 0), (99, 0)),
        softcap=True,
        dropout=True,
        unequal_head_dims=True,
        deterministic=True,  # its backward adds nothing atomically
        distributions=("triton",),
    )

    def __init__(
        self,
        block_size: tuple[int, int] = (128, 128),
        kernel_options: Mapping[str, int | bool] | None = None,
        eager: bool = False,
    ) -> None:
        self.block_size = block_size
        self.kernel_options = tuple(sorted((kernel_options or {}).items()))
        self.eager = eager
        if eager:
            self.capability = Capability(softcap=True, dropout=True, unequal_head_dims=True, deterministic=True)

    def missing(self) -> str | None:
        return _missing(self.eager)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, options: Options, out: Tensor) -> Tensor:
        if not q.shape[0] or not k.shape[0]:
            out.zero_()
            return q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=accumulation_dtype(q.dtype))
        inputs = block_mask(call, self.block_size, q.device), *map(within_reach, as_batch(q, k, v))
        with torch.no_grad():
            result, lse = self._attend(options)(*inputs)
            if options.dropout is not None:
                hashes = _dropout_hashes(options.dropout, q.shape[1])
                part, part_lse = self._attend(options, options.dropout)(*inputs, *hashes)
                result = part * _kept_weight(part_lse, lse, options.dropout.p)[..., None]
        out.copy_(from_batch(result))
        return lse[0]

    def backward(self, dout: Tensor, saved: SavedCall, grads: Grads) -> None:
        q, k, v, out, lse, call, options = saved
        if not q.shape[0] or not k.shape[0]:
            for grad in grads:
                grad.zero_()
            return
        inputs = [within_reach(x.detach()).requires_grad_() for x in as_batch(q, k, v)]
        mask, dropout, whole = block_mask(call, self.block_size, q.device), options.dropout, lse[None]
        with torch.enable_grad():
            part, part_lse = self._attend(options)(mask, *inputs)
            if dropout is not None:
                hashes = _dropout_hashes(dropout, q.shape[1])
                kept_part, kept_lse = self._attend(options, dropout)(mask, *inputs, *hashes)
        with torch.no_grad():
            if dropout is None:
                outputs: tuple[Tensor, ...] = part, part_lse
                cotangents: tuple[Tensor, ...] = _cotangents(part, part_lse, whole, *as_batch(dout, out))
            else:
                outputs = kept_part, kept_lse, part_lse
                lses = kept_lse, part_lse, whole
                cotangents = _dropout_cotangents(kept_part, lses, dout, out, dropout.p)
        results = torch.autograd.grad(outputs, inputs, tuple(map(within_reach, cotangents)))
        for grad, result in zip(grads, results, strict=True):
            grad.copy_(from_batch(result))

    def _attend(self, options: Options, dropout: Dropout | None = None) -> Attend:
        p = 0.0 if dropout is None else dropout.p
        if self.eager:
            return eager_attention(options.scale, options.softcap, p)
        return _compiled(options.scale, options.softcap, p, self.kernel_options)


def within_reach(x: Tensor) -> Tensor:
    """The same numbers of a (1, H, T, D) tensor (or (1, H, T)), copied head by head where the kernel could not count to
    its last row otherwise.

    Raises NotImplementedError if the rows of one head are too many even so.
    """
    if x.shape[2] * x.stride(2) <= COUNTED:
        return x
    if x[0, 0].numel() > COUNTED:
        raise NotImplementedError(
            f"flex counts the numbers of a head in int32: {x.shape[2]:,} rows of {x.shape[3]} are too many; put them "
            "on more ranks"
        )
    return x.contiguous()


def _cotangents(part: Tensor, part_lse: Tensor, lse: Tensor, dout: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Cotangents of a part's out (1, H, T, V) and lse (1, H, T), from dout, out and lse of the whole softmax.

    The second is computed from the first as it was rounded: the gradient of the scores then stays orthogonal to a shift
    of them.
    """
    weights = torch.exp(part_lse - finite_lse(lse))
    dpart = (dout.to(lse.dtype) * weights[..., None]).to(part.dtype)
    return dpart, (dpart.to(lse.dtype) * (part.to(lse.dtype) - out.to(lse.dtype))).sum(-1)


def _dropout_cotangents(
    part: Tensor, lses: tuple[Tensor, Tensor, Tensor], dout: Tensor, out: Tensor, p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of `part` (out over the pairs that are kept), of the lse over these, and of the lse over all pairs of
    the call. `lses` are these two and that of the whole softmax, whose are dout and out as well."""
    part_lse, all_lse, lse = lses
    dout, out = as_batch(dout, out)
    dpart = (dout.to(lse.dtype) * _kept_weight(part_lse, lse, p)[..., None]).to(part.dtype)
    dall = -torch.exp(all_lse - finite_lse(lse)) * (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    return dpart, (dpart.to(lse.dtype) * part.to(lse.dtype)).sum(-1), dall


def _kept_weight(part_lse: Tensor, lse: Tensor, p: float) -> Tensor:
    """What a softmax over the kept pairs of a part counts in the whole."""
    return torch.exp(part_lse - finite_lse(lse)) / (1 - p)


def _dropout_hashes(dropout: Dropout, heads: int) -> tuple[Tensor, Tensor]:
    """(H, T) and (S,) int64, whose sums say which pairs are kept: seed and first head are no constants of a kernel."""
    return row_hashes(dropout.seed, dropout.q_index, dropout.first_head, heads), dropout.k_index


class RowBounds(NamedTuple):
    """The keys `first[i] <= j < last[i]` that each query row of a call sees, int32 (T,), counted from `call.k[0]`."""

    first: Tensor
    last: Tensor


def row_bounds(call: Call) -> RowBounds:
    """Made on the host, whatever the default device is. A row without keys has `first == last`."""
    with torch.device("cpu"):
        return _row_bounds(call)


def _row_bounds(call: Call) -> RowBounds:
    n, m = (torch.tensor(lengths) for lengths in (call.q_lens, call.k_lens))
    starts = torch.tensor([0, *accumulate(call.q_lens)][:-1])
    block = torch.repeat_interleave(torch.arange(len(n)), n)
    low = torch.tensor(call.k_starts)[block]
    high = low + m[block]
    diagonal = low + torch.arange(len(block)) - starts[block] + (m - n)[block]
    first = low if call.left < 0 else torch.maximum(low, diagonal - call.left)
    last = high if call.right < 0 else torch.minimum(high, diagonal + call.right + 1)
    first = torch.minimum(first, high)
    return RowBounds(first.int(), torch.maximum(first, last).int())


def block_mask(call: Call, block_size: tuple[int, int], device: torch.device) -> Any:
    """The call's `BlockMask`, made once for each device and tile size: a plan serves every layer of a step."""
    return kept(call, ("block mask", block_size, device), lambda: _block_mask(call, block_size, device))


def _block_mask(call: Call, block_size: tuple[int, int], device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    first, last = (to_device(x, device) for x in row_bounds(call))

    def inside(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (first[query] <= key) & (key < last[query])

    partial, full = _mask_tiles(first.long(), last.long(), call.k[1] - call.k[0], block_size)
    return BlockMask.from_kv_blocks(
        *_listed_tiles(partial),
        *_listed_tiles(full),
        BLOCK_SIZE=block_size,
        mask_mod=inside,
        seq_lengths=(call.q[1] - call.q[0], call.k[1] - call.k[0]),
    )


def _mask_tiles(first: Tensor, last: Tensor, keys: int, block_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Which tiles (query tiles, key tiles) hold some pairs but not all, and which all: as many rows see one of a tile's
    keys, or all of them, as intervals of tiles begin before it and do not end. A tile with rows or keys over the end
    of the tensors is never full."""
    rows, cols = -(-len(first) // block_size[0]), -(-keys // block_size[1])
    tile = torch.arange(len(first), device=first.device) // block_size[0]

    def covering(start: Tensor, stop: Tensor) -> Tensor:
        steps = torch.zeros(rows, cols + 1, dtype=torch.int32, device=first.device)
        ones = (stop > start).int()
        steps.index_put_((tile, start.clamp(max=cols)), ones, accumulate=True)
        steps.index_put_((tile, stop.clamp(max=cols)), -ones, accumulate=True)
        return steps.cumsum(1, dtype=torch.int32)[:, :cols]

    size = block_size[1]
    touched = covering(first // size, torch.where(last > first, (last + size - 1) // size, 0)) > 0
    full = covering((first + size - 1) // size, last // size) == block_size[0]
    return touched & ~full, full


def _listed_tiles(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """A BlockMask's form of (query tiles, key tiles): how many each row has, and which, first."""
    order = torch.argsort(tiles.int(), dim=1, descending=True, stable=True)
    return tiles.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]


def _score_mod(softcap: float, p: float, hashes: Sequence[Tensor]) -> Callable[..., Tensor] | None:
    if not softcap and not p:
        return None

    def changed(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        if p:
            rows, keys = hashes
            score = torch.where(is_kept(rows[head, query] + keys[key], p), score, -math.inf)
        return score

    return changed


@cache
def _compiled(scale: float, softcap: float, p: float, kernel_options: tuple[tuple[str, int | bool], ...]) -> Attend:
    """BlockMask, q (1, H, T, D), k, v -> out (1, H, T, V), lse (1, H, T), compiled for lengths that vary."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    # Short queries would get the decoding kernel, one more variant to compile.
    chosen: Any = {"FORCE_USE_FLEX_ATTENTION": True} | dict(kernel_options)

    def attend(mask: Any, q: Tensor, k: Tensor, v: Tensor, *hashes: Tensor) -> tuple[Tensor, Tensor]:
        score_mod = _score_mod(softcap, p, hashes)
        result: Any = flex_attention(
            q, k, v, score_mod, mask, scale, enable_gqa=True, kernel_options=chosen, return_aux=AuxRequest(lse=True)
        )
        return result[0], result[1].lse

    compiled = torch.compile(attend, dynamic=True, fullgraph=True)

    def bounded(mask: Any, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        with _few_variants():
            return compiled(mask, *tensors)

    return bounded


@contextmanager
def _few_variants() -> Iterator[None]:
    """Settings of torch's compiler: lengths that happen to be equal make no variant of their own, and scale and cap are
    constants of the kernel."""
    import torch._dynamo.config
    import torch.fx.experimental._config

    dynamo: Any = torch._dynamo.config
    shapes: Any = torch.fx.experimental._config
    with dynamo.patch(recompile_limit=VARIANTS, specialize_float=True), shapes.patch(use_duck_shape=False):
        yield


@cache
def eager_attention(scale: float, softcap: float, p: float) -> Attend:
    """The mathematics of the operator without a kernel. The public function refuses gradients on CPU; this does not."""
    from torch._higher_order_ops.flex_attention import flex_attention

    def plain(score: Tensor, *_: Tensor) -> Tensor:
        return score

    def attend(mask: Any, q: Tensor, k: Tensor, v: Tensor, *hashes: Tensor) -> tuple[Tensor, Tensor]:
        score_mod = _score_mod(softcap, p, hashes) or plain
        result, log2, _ = flex_attention(q, k, v, score_mod, mask.as_tuple(), scale, {})
        return result, log2 * math.log(2)

    return attend


@cache
def _missing(eager: bool) -> str | None:
    try:
        from torch.nn.attention.flex_attention import AuxRequest  # noqa: F401
    except ImportError:
        return f"torch {torch.__version__} has no FlexAttention that returns its log-sum-exp"
    if eager:
        return None
    try:
        import triton  # noqa: F401
    except ImportError:
        return "needs triton, which is not installed"
    return None
