"""Random recurrences in float64, and each document of them run alone, token by token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ringattn import Documents
from ringattn.recurrent.kernels.contract import Inputs
from ringattn.recurrent.kernels.tokens import Tokens

# name: delta rule, decays by key dim; "steps" is Mamba's form
RULES = {
    "delta": (True, False),
    "kimi": (True, True),
    "mamba2": (False, False),
    "diagonal": (False, True),
    "steps": (False, False),
}


def inputs(rule: str, tokens: int, heads: tuple[int, int] = (2, 4), dims: tuple[int, int] = (5, 3), seed: int = 0):
    """Inputs whose states neither fade at once nor grow."""
    delta, diagonal = RULES[rule]
    (K, H), (D, V) = heads, dims
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    k = torch.nn.functional.normalize(draw(tokens, K, D), dim=-1)
    decay = -0.3 * draw(tokens, H, D).abs() if diagonal else -0.3 * draw(tokens, H).abs()
    beta = draw(tokens, H).sigmoid() if delta else None
    step = None
    if rule == "steps":
        decay, step = -draw(H).abs().expand(tokens, H), draw(tokens, H).abs()
    return Inputs(draw(tokens, K, D), k, draw(tokens, H, V), decay, beta, step)


@dataclass
class Truth:
    """Outputs and gradients of all inputs, in the order of `Inputs`; padding has zeros."""

    out: Tensor
    grads: list[Tensor]


def alone(x: Inputs, docs: Documents, dout: Tensor) -> Truth:
    """Every document by itself."""
    leaves = Inputs(*(None if one is None else one.clone().requires_grad_() for one in x))
    out = torch.zeros_like(x.v)
    for start, length in zip(docs.starts, docs.lengths, strict=True):
        if length:
            part = slice(start, start + length)
            found, _ = Tokens().run(leaves.rows(part), (length,), None)
            (found * dout[part]).sum().backward()
            out[part] = found.detach()
    return Truth(out, [torch.zeros_like(one) if one.grad is None else one.grad for one in leaves if one is not None])
