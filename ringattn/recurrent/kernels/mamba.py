"""mamba-ssm's chunk scan of Mamba-2 (package `mamba_ssm`): key heads are its groups, and it multiplies by steps itself.

Whole documents go in one call, told apart by numbers of sequences. It takes one first state and gives one last state a
row of the batch, and has no gradient through the last states of several sequences in a row: so each piece that has
states is a call of its own. A rank has few of them.
"""

from collections.abc import Callable
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ringattn.kernels.probing import why_missing
from ringattn.recurrent.kernels.contract import Inputs, Signature
from ringattn.recurrent.kernels.loading import foreign_dtypes, load, numbers
from ringattn.recurrent.kernels.reach import gradient_near, parts_of
from ringattn.recurrent.piles import put_together

DISTRIBUTION = "mamba-ssm"
FUNCTION = "mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined"
CHUNK = 256  # of all models that transformers has
_NEEDED = {"x", "dt", "A", "B", "C", "chunk_size", "initial_states", "seq_idx", "return_final_states"}


class Mamba:
    name = "mamba"
    devices: tuple[str, ...] = ("cuda",)
    distributions: tuple[str, ...] = (DISTRIBUTION, "causal-conv1d")

    def missing(self, signature: Signature) -> str | None:
        return why_missing(_function)

    def refusal(self, signature: Signature) -> str | None:
        if signature.device not in self.devices:
            return f"runs on {' and '.join(self.devices)} tensors only, got {signature.device}"
        if signature.delta or signature.diagonal:
            return "computes Mamba-2 alone: no delta rule and a decay a head"
        if not signature.steps:
            return "takes decays as a rate a head times a step, which this call does not give"
        return foreign_dtypes(signature.dtypes[:2])

    def outputs(self, x: Inputs, lengths: tuple[int, ...]) -> Tensor:
        return _scan(x, seq_idx=numbers(lengths, x.v.device)) if lengths else x.v

    def run(self, x: Inputs, lengths: tuple[int, ...], state: Tensor | None) -> tuple[Tensor, Tensor]:
        if not lengths:
            return x.v[:0], x.v.new_zeros(0, *x.state_shape, dtype=x.wide)
        piles = [slice(end - length, end) for end, length in zip(accumulate(lengths), lengths, strict=True)]
        outs, lasts = [], []
        for number, part in enumerate(x.taken_apart(piles)):
            first = None if state is None else state[number : number + 1].mT.contiguous()
            out, last = _scan(part, first, last=True)
            outs.append(out)
            lasts.append(last.mT.to(x.wide))
        return put_together(outs, piles, len(x.v)), torch.cat(lasts)


def _scan(x: Inputs, states: Tensor | None = None, last: bool = False, seq_idx: Tensor | None = None) -> Any:
    """Its outputs (t, H, V), with the last state (1, H, V, D) if that is asked for."""
    found = [_call(part, None if states is None else states[:, heads], last, seq_idx) for heads, part in parts_of(x)]
    if len(found) == 1:
        return found[0] if last else found[0][0]
    out = torch.cat([one for one, _ in found], 1)
    return (out, torch.cat([one for _, one in found], 1)) if last else out


def _call(x: Inputs, states: Tensor | None, last: bool, seq_idx: Tensor | None) -> tuple[Tensor, Any]:
    """Of heads that it can count: outputs, and the last state or None."""
    assert x.step is not None
    rows = {"x": x.v, "dt": x.step, "B": x.k, "C": x.q}
    own: dict[str, Any] = {} if seq_idx is None else {"seq_idx": seq_idx}
    if last:
        own = {"initial_states": states, "return_final_states": True}
    found = _function()(**{name: one[None] for name, one in rows.items()}, A=x.decay[0], chunk_size=CHUNK, **own)
    out, state = found if last else (found, None)
    return gradient_near(out).squeeze(0).to(x.v.dtype), state


@cache  # what raises is not kept, so a repaired installation is found
def _function() -> Callable[..., Any]:
    return load(DISTRIBUTION, FUNCTION, _NEEDED)
