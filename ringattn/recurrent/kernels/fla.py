"""flash-linear-attention's Triton kernels (package `fla`): the gated delta rule, Kimi's delta attention, linear
attention with a decay a head, and gated linear attention.

Each takes first states and gives last ones for several pieces in one call, with the gradients of both. Without the
delta rule it has as many key heads as value heads, so key heads are repeated.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ringattn.kernels.probing import parameters, why_missing
from ringattn.recurrent.kernels.contract import Inputs, Signature, of_value_heads
from ringattn.recurrent.kernels.fla_guard import refused
from ringattn.recurrent.kernels.loading import cumulative, foreign_dtypes, load

DISTRIBUTION = "flash-linear-attention"
# By delta rule and decays by key dim.
FUNCTIONS = {
    (True, False): "fla.ops.gated_delta_rule.chunk_gated_delta_rule",
    (True, True): "fla.ops.kda.chunk_kda",
    (False, False): "fla.ops.simple_gla.chunk_simple_gla",
    (False, True): "fla.ops.gla.chunk_gla",
}
_NEEDED = {"q", "k", "v", "g", "scale", "initial_state", "output_final_state", "cu_seqlens"}
_LARGEST_KEY = 256
_CPU = torch.device("cpu")


class Fla:
    name = "fla"
    devices: tuple[str, ...] = ("cuda",)
    distributions: tuple[str, ...] = (DISTRIBUTION, "fla-core", "tilelang", "flash-qla")

    def missing(self, signature: Signature) -> str | None:
        """With what is installed beside it: fla refuses to compute on some versions of Triton."""
        rule = signature.delta, signature.diagonal
        return why_missing(lambda: _function(*rule)) or refused(_function(*rule), signature)

    def refusal(self, signature: Signature) -> str | None:
        if signature.device not in self.devices:
            return f"runs on {' and '.join(self.devices)} tensors only, got {signature.device}"
        if signature.key_dim > _LARGEST_KEY:
            return f"takes key dims up to {_LARGEST_KEY}, got {signature.key_dim}"
        return foreign_dtypes(signature.dtypes[:2])

    def outputs(self, x: Inputs, lengths: tuple[int, ...]) -> Tensor:
        return _call(x, lengths, None, False)[0] if lengths else x.v

    def run(self, x: Inputs, lengths: tuple[int, ...], state: Tensor | None) -> tuple[Tensor, Tensor]:
        if not lengths:
            return x.v, x.v.new_zeros(0, *x.state_shape, dtype=x.wide)
        out, last = _call(x, lengths, state, True)
        return out, last.to(x.wide)


def _call(x: Inputs, lengths: tuple[int, ...], state: Tensor | None, last: bool) -> tuple[Tensor, Any]:
    """Outputs (t, H, V) and, if wanted, the last states."""
    delta, dtype = x.beta is not None, x.v.dtype
    function = _function(delta, x.decay.dim() == 3)
    x = x.plain()
    heads = x.v.shape[1]
    q, k = (one if delta else of_value_heads(one, heads) for one in (x.q, x.k))
    cu_seqlens = cumulative(lengths, x.v.device)
    arguments: dict[str, Any] = {"q": q, "k": k, "v": x.v.to(dtype), "g": x.decay}
    if x.beta is not None:
        arguments["beta"] = x.beta
    arguments = {name: one[None] for name, one in arguments.items()}
    if "cu_seqlens_cpu" in parameters(function):  # else it asks the device, and waits
        arguments["cu_seqlens_cpu"] = cumulative(lengths, _CPU)
    out, states = function(
        **arguments, scale=1.0, initial_state=state, output_final_state=last, cu_seqlens=cu_seqlens
    )  # fmt: skip
    return out.squeeze(0).to(dtype), states


@cache  # what raises is not kept, so a repaired installation is found
def _function(delta: bool, diagonal: bool) -> Callable[..., Any]:
    return load(DISTRIBUTION, FUNCTIONS[delta, diagonal], _NEEDED | ({"beta"} if delta else set()))
