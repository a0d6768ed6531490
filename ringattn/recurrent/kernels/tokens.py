"""The recurrence token by token in plain torch, in the dtype of the states, float64 included: the judge of the others.

Slow, and its backward pass keeps a state for every token.
"""

import torch
from torch import Tensor

from ringattn.recurrent.kernels.contract import Inputs, Own, of_value_heads


class Tokens(Own):
    """Written as in the contract, line by line."""

    name = "tokens"

    def run(self, x: Inputs, lengths: tuple[int, ...], state: Tensor | None) -> tuple[Tensor, Tensor]:
        dtype, x = x.v.dtype, x.plain()
        heads = x.v.shape[1]
        q, k = (of_value_heads(one, heads).to(x.wide) for one in (x.q, x.k))
        v, decay = x.v.to(x.wide), x.decay.to(x.wide)
        decay = decay if decay.dim() == 3 else decay[..., None]
        beta = None if x.beta is None else x.beta.to(x.wide)
        outs, lasts, row = [], [], 0
        for number, length in enumerate(lengths):
            S = v.new_zeros(x.state_shape) if state is None else state[number]
            for i in range(row, row + length):
                S = decay[i].exp()[..., None] * S
                u = v[i] if beta is None else beta[i, :, None] * (v[i] - torch.einsum("hdv,hd->hv", S, k[i]))
                S = S + k[i][..., None] * u[:, None]
                outs.append(torch.einsum("hdv,hd->hv", S, q[i]))
            lasts.append(S)
            row += length
        out = torch.stack(outs) if outs else v
        last = torch.stack(lasts) if lasts else v.new_zeros(0, *x.state_shape)
        return out.to(dtype), last
