"""Kernels of packages that are not installed: they take the packages' arguments, and compute with the reference."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ringattn.kernels.backends.reference import Reference
from ringattn.kernels.spec import Block, Call, Grads, Options, SavedCall

Record = list[dict[str, Any]]  # the keyword arguments of every launch
INF = float("inf")


def call_of(q_ends: Sequence[int], k_starts: Sequence[int], k_lens: Sequence[int], left: int, right: int) -> Call:
    """The call that a kernel was asked for: cumulative query lengths from 0 on, and each block's keys."""
    spans = zip(q_ends[:-1], q_ends[1:], k_starts, k_lens, strict=True)
    return Call(tuple(Block((a, b), (c, c + n)) for a, b, c, n in spans), left, right)


def attend(q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float, softcap: float = 0.0) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:2], v.shape[2], dtype=torch.float64)
    lse = Reference().forward(q.double(), k.double(), v.double(), call, Options(scale, softcap), out)
    return out.to(q.dtype), lse.float()


def gradients(tensors: Sequence[Tensor], lse: Tensor, call: Call, scale: float, softcap: float = 0.0) -> Grads:
    """Of dout, q, k, v, out."""
    dout, q, k, v, out = (x.double() for x in tensors)
    grads = Grads(torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    Reference().backward(dout, SavedCall(q, k, v, out, lse.double(), call, Options(scale, softcap)), grads)
    return Grads(*(x.to(tensors[1].dtype) for x in grads))


def fa2(record: Record) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """With the windows of the real kernel: one of `max_seqlen_k` or more is open, an open one beside a closed one is
    `max_seqlen_k`; and with its +inf for rows without keys, in both directions."""

    def call(cu_q: Tensor, cu_k: Tensor, max_k: int, causal: bool, left: int, right: int) -> Call:
        right = 0 if causal else right
        left, right = (-1 if side >= max_k else side for side in (left, right))
        if (left < 0) != (right < 0):
            left, right = (max_k if side < 0 else side for side in (left, right))
        starts = cu_k.tolist()
        return call_of(cu_q.tolist(), starts[:-1], cu_k.diff().tolist(), left, right)

    def forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
    ):  # fmt: skip
        record.append(dict(locals()))
        asked = call(cu_seqlens_q, cu_seqlens_k, max_seqlen_k, causal, window_size_left, window_size_right)
        out, lse = attend(q, k, v, asked, softmax_scale, softcap)
        return out, lse.masked_fill(lse == -INF, INF), None, None

    def backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None,
    ):  # fmt: skip
        record.append(dict(locals()))
        assert not (softmax_lse == -INF).any()
        asked = call(cu_seqlens_q, cu_seqlens_k, max_seqlen_k, causal, window_size_left, window_size_right)
        for into, grad in zip(
            (dq, dk, dv), gradients((dout, q, k, v, out), softmax_lse, asked, softmax_scale, softcap), strict=True
        ):
            into.copy_(grad)

    return forward, backward


def fa3(record: Record, out_name: str = "out", causal_name: str = "is_causal", softcap: bool = True) -> Any:
    """Registers real operators, as a build with these argument names does; returns what must stay referenced."""
    common = (
        "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? seqused_k=None, int? max_seqlen_q=None, "
        f"int? max_seqlen_k=None, float? softmax_scale=None, bool {causal_name}=False, int window_size_left=-1, "
        f"int window_size_right=-1{', float softcap=0.0' if softcap else ''}"
    )
    library = torch.library.Library("flash_attn_3", "FRAGMENT")
    tensors = "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse"
    into = ", ".join(f"Tensor({x}!)? {x}=None" for x in ("dq", "dk", "dv"))
    library.define(f"fwd(Tensor q, Tensor k, Tensor v, Tensor(o!)? {out_name}=None, {common}) -> (Tensor(o!), Tensor)")
    library.define(f"bwd({tensors}, {into}, {common}, bool deterministic=False) -> Tensor")

    def call(arguments: dict[str, Any], keys: int) -> Call:
        starts, used = arguments["cu_seqlens_k"], arguments.get("seqused_k")
        lens = (starts.diff() if used is None else used).tolist()
        assert starts[-1] == keys
        assert arguments["max_seqlen_k"] >= max(lens)
        left, right = arguments["window_size_left"], arguments["window_size_right"]
        assert arguments[causal_name] == ((left, right) == (-1, 0))
        return call_of(arguments["cu_seqlens_q"].tolist(), starts.tolist()[:-1], lens, left, right)

    def forward(q: Tensor, k: Tensor, v: Tensor, *positional: Any, **named: Any) -> tuple[Tensor, Tensor]:
        named = _filled("fwd", (q, k, v, *positional), named)
        record.append(named)
        out, lse = attend(q, k, v, call(named, len(k)), named["softmax_scale"], named.get("softcap", 0.0))
        return named[out_name].copy_(out), lse

    def backward(*positional: Any, **named: Any) -> Tensor:
        named = _filled("bwd", positional, named)
        record.append(named)
        *tensors, lse = (named[x] for x in ("dout", "q", "k", "v", "out", "softmax_lse"))
        asked = call(named, len(named["k"]))
        grads = gradients(tensors, lse, asked, named["softmax_scale"], named.get("softcap", 0.0))
        for name in ("dq", "dk", "dv"):
            named[name].copy_(getattr(grads, name))
        return lse

    library.impl("fwd", forward, "CPU")
    library.impl("bwd", backward, "CPU")
    return library


def _filled(operator: str, positional: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name: the dispatcher drops those that equal their default."""
    arguments = getattr(torch.ops.flash_attn_3, operator).default._schema.arguments
    given = dict(zip((argument.name for argument in arguments), positional, strict=False)) | named
    return {argument.name: given.get(argument.name, argument.default_value) for argument in arguments}


def npu(record: Record, says_layout: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Refuses rows without keys, of which nothing is documented; stores statistics per block unless told a layout."""

    def call(kind: str, layout: str, mask: Tensor | None, mode: int, ends: tuple, band: tuple[int, int]) -> Call:
        assert layout == "TND"
        assert (mask is None) == (mode == 0)
        if mask is not None:
            assert torch.equal(mask, torch.ones(2048, 2048, dtype=torch.bool).triu(1))
        q_ends, k_ends = ([0, *x] for x in ends)
        lens = [stop - start for start, stop in pairwise(k_ends)]
        record.append({"kind": kind, "mode": mode, "band": band, "q_ends": q_ends, "k_ends": k_ends})
        return call_of(q_ends, k_ends[:-1], lens, *{0: (-1, -1), 3: (-1, 0), 4: band}[mode])

    def stored(lse: Tensor, call: Call) -> Tensor:
        blocks = [lse[:, slice(*block.q)] for block in call.blocks]
        flat = lse.T if says_layout else torch.cat([x.reshape(-1) for x in blocks]).view(lse.shape[1], lse.shape[0])
        return flat[..., None].expand(-1, -1, 8).contiguous()

    def read(statistics: Tensor, call: Call) -> Tensor:
        flat, heads = statistics[..., 0], statistics.shape[1]
        if says_layout:
            return flat.T
        return torch.cat([flat[slice(*b.q)].reshape(heads, -1) for b in call.blocks], dim=1)

    def forward(
        query, key, value, head_num, input_layout, *, atten_mask=None, scale=1.0, pre_tockens=2**31 - 1,
        next_tockens=2**31 - 1, actual_seq_qlen=None, actual_seq_kvlen=None, sparse_mode=0,
    ):  # fmt: skip
        ends, band = (actual_seq_qlen, actual_seq_kvlen), (pre_tockens, next_tockens)
        asked = call("forward", input_layout, atten_mask, sparse_mode, ends, band)
        out, lse = attend(query, key, value, asked, scale)
        assert lse.isfinite().all()
        assert head_num == query.shape[1]
        high = stored(lse - 0.7, asked)
        return out, high, torch.full_like(high, 0.7).exp(), None, 0, 0, 0

    def backward(
        query, key, value, dy, head_num, input_layout, *, atten_mask=None, softmax_max=None, softmax_sum=None,
        attention_in=None, scale_value=1.0, pre_tockens=2**31 - 1, next_tockens=2**31 - 1, actual_seq_qlen=None,
        actual_seq_kvlen=None, sparse_mode=0,
    ):  # fmt: skip
        ends, band = (actual_seq_qlen, actual_seq_kvlen), (pre_tockens, next_tockens)
        asked = call("backward", input_layout, atten_mask, sparse_mode, ends, band)
        lse = read(softmax_max + softmax_sum.log(), asked)
        return (*gradients((dy, query, key, value, attention_in), lse, asked, scale_value), None)

    if not says_layout:
        return forward, backward
    return _with_layout(forward), _with_layout(backward)


def _with_layout(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, atten_mask=None, pre_tockens=2**31 - 1, next_tockens=2**31 - 1, softmax_layout="", **named):
        assert softmax_layout == "TND"
        return kernel(*args, atten_mask=atten_mask, pre_tockens=pre_tockens, next_tockens=next_tockens, **named)

    return wrapped


def xpu(record: Record) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(1, H, n, D) layouts; no empty tensors, and no causal block that is not square."""

    def forward(q, k, v, dropout_p, is_causal, return_debug_mask, *, scale):
        record.append({"queries": q.shape[2], "keys": k.shape[2], "causal": is_causal})
        asked = _dense(q, k, is_causal)
        out, lse = attend(*(x[0].transpose(0, 1) for x in (q, k, v)), asked, scale)
        return out.transpose(0, 1)[None], lse[None], None, None, q.shape[2], k.shape[2], None, None, None

    def backward(dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, seed, offset, *, scale):
        assert (max_q, max_k) == (q.shape[2], k.shape[2])
        asked = _dense(q, k, is_causal)
        grads = gradients([x[0].transpose(0, 1) for x in (dout, q, k, v, out)], lse[0], asked, scale)
        return tuple(x.transpose(0, 1)[None] for x in grads)

    def _dense(q: Tensor, k: Tensor, causal: bool) -> Call:
        n, m = q.shape[2], k.shape[2]
        assert n
        assert m
        assert n == m or not causal
        return Call((Block((0, n), (0, m)),), -1, 0 if causal else -1)

    return forward, backward
