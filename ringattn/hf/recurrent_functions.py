"""What stands in the place of the functions by which transformers' recurrent layers mix tokens.

Each has the arguments of the function that it replaces (transformers 5.24) and gives the same, of a rank's tokens. What
differs is said with it. What a caller asks for and cannot be had is refused by name.

Legend: t tokens of this rank, in one row; C channels, H value heads, K key heads, D key dim, V value dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ringattn.parallel.layout import Layout
from ringattn.recurrent import parallel_convolution, parallel_recurrence

EPSILON = 1e-6  # of the norms of queries and keys, as in flash-linear-attention


@dataclass(frozen=True)
class Batch:
    """The batch that a recurrent layer works on.

    Arguments:
        empty: this rank has no tokens, and its tensors hold one row that is none (see `ringattn.hf.empty`).
    """

    layout: Layout
    empty: bool

    def tokens(self, x: Tensor) -> Tensor:
        """(1, t, ...) -> (t, ...)."""
        if x.shape[0] != 1:
            raise ValueError(f"a packed batch has batch size 1, got {x.shape[0]}: lay the rows end to end as documents")
        return x[0, :0] if self.empty else x.squeeze(0)

    def row(self, out: Tensor) -> Tensor:
        """(t, ...) -> (1, t, ...); for a rank without tokens a row of zeros that the backward pass goes through."""
        return (torch.cat([out, out.new_zeros(1, *out.shape[1:])]) if self.empty else out)[None]


def causal_conv1d_fn(
    batch: Batch,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> Tensor:
    """(1, C, t) -> (1, C, t)."""
    ours = activation in (None, "silu", "swish")
    x = batch.tokens(hidden_states.transpose(1, 2))
    out = parallel_convolution(x, weight, bias, batch.layout, activation=activation if ours else None)
    if not ours:
        from transformers.activations import ACT2FN

        out = ACT2FN[activation](out)
    return batch.row(out).transpose(1, 2)


def chunk_delta_rule(
    batch: Batch,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The gated delta rule, and Kimi's with a decay for each key dim: (1, t, K, D), (1, t, H, V) -> (1, t, H, V)."""
    _refuse_states(initial_state, output_final_state)
    q, k, v, decay, beta = (batch.tokens(x) for x in (query, key, value, g, beta))
    wide_q, wide_k = _wide(q), _wide(k)
    if use_qk_l2norm_in_kernel:
        wide_q, wide_k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + EPSILON) for x in (wide_q, wide_k))
    # Rounded once, to the dtype that kernels are fast in and that the layer norms them in.
    q, k = (wide_q * q.shape[-1] ** -0.5).to(v.dtype), wide_k.to(v.dtype)
    out = parallel_recurrence(q, k, v, batch.layout, decay=decay, beta=beta)
    return batch.row(out.to(query.dtype)), None


def mamba2_chunk_scan(
    batch: Batch,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    z: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """x (1, t, H, V), dt (1, t, H), A (H,), B and C (1, t, K, D) -> (1, t, H, V)."""
    _refuse_states(initial_states, return_final_states)
    if z is not None:
        raise NotImplementedError("mamba2_chunk_scan with a gate z is not supported: no layer of transformers asks it")
    x, dt, B, C = (batch.tokens(one) for one in (hidden_states, dt, B, C))
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = F.softplus(dt) if dt_softplus else dt
    dt = _wide(dt.clamp(*dt_limit))
    dtype = torch.promote_types(x.dtype, torch.promote_types(B.dtype, C.dtype))
    out = parallel_recurrence(
        C.to(dtype), B.to(dtype), x.to(dtype), batch.layout, decay=A.to(dt.dtype), step=dt
    )  # fmt: skip
    out = out.to(dt.dtype)
    return batch.row(out if D is None else out + D[:, None] * x)


def mamba_selective_scan(
    batch: Batch,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Mamba-1, where every channel is a value head of one dim: x, dt, z (1, C, t), A (C, D), B and C (1, D, t) ->
    (1, C, t)."""
    _refuse_states(None, return_last_state)
    x, dt, B, C = (batch.tokens(one.transpose(1, 2)) for one in (hidden_states, dt, B, C))
    dt = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)
    dt = _wide(F.softplus(dt) if delta_softplus else dt)
    x = _wide(x)
    decay = A.to(dt.dtype) * dt[..., None]
    out = parallel_recurrence(_wide(C)[:, None], _wide(B)[:, None], (x * dt)[..., None], batch.layout, decay=decay)[
        ..., 0
    ]
    out = out if D is None else out + D * x
    out = batch.row(out).transpose(1, 2)
    return out if z is None else out * F.silu(z)


def fused(batch: Batch, *args: Any, **kwargs: Any) -> None:
    """Convolution, scan, norm and projection in one: the layer computes them apart where it gets None."""


def decode(batch: Batch, *args: Any, **kwargs: Any) -> None:
    """The next token from a state that was kept."""
    raise NotImplementedError(
        "a step from a kept state is for generation, which a parallelized model cannot do; handle.undo() gives the "
        "plain model back"
    )


Replacement = Callable[..., Any]
# By the name in the layer's module. A layer must call those of these that it knows once in a forward pass, and none of
# those aside.
MIXING: dict[str, Replacement] = {
    "causal_conv1d_fn": causal_conv1d_fn,
    "torch_chunk_gated_delta_rule": chunk_delta_rule,
    "chunk_kimi_delta_attention": chunk_delta_rule,
    "mamba2_chunk_scan": mamba2_chunk_scan,
    "mamba_selective_scan": mamba_selective_scan,
}
ASIDE: dict[str, Replacement] = {
    "mamba2_split_conv1d_scan_combined": fused,
    "mamba_inner_fn": fused,
    "causal_conv1d_update": decode,
    "torch_recurrent_gated_delta_rule": decode,
    "recurrent_kimi_delta_attention": decode,
    "mamba2_selective_state_update": decode,
    "mamba_selective_state_update": decode,
}


def lightning_attention(batch: Batch, module: Any, hidden_states: Tensor) -> Tensor:
    """What MiniMax computes inside of its layer's forward pass: (1, t, hidden) -> (1, t, H · V)."""
    heads, dim = module.num_attention_heads, module.head_dim
    qkv = module.act_fn(module.qkv_proj(hidden_states))
    x = batch.tokens(qkv).unflatten(-1, (heads, 3 * dim))
    q, k, v = x.split(dim, -1)
    decay = -module.slope_rate.flatten().to(torch.promote_types(q.dtype, torch.float32)).expand(len(q), heads)
    out = parallel_recurrence(q, k, v, batch.layout, decay=decay)
    return batch.row(out.flatten(1).to(qkv.dtype))


def _wide(x: Tensor) -> Tensor:
    """float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _refuse_states(first: Tensor | None, last: bool) -> None:
    if first is not None or last:
        decode(None)  # type: ignore[arg-type]
