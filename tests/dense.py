"""One dense softmax over the whole stream, by autograd: what every distributed result is compared with."""

from dataclasses import dataclass, field

import torch

from ringattn import Documents, Mask
from ringattn.kernels.backends.reference import kept_pairs


@dataclass(frozen=True)
class Case:
    """One attention to compute, small enough to send to worker processes."""

    docs: Documents
    mask: Mask = Mask()
    heads: tuple[int, int] = (4, 4)
    dims: tuple[int, int] = (8, 8)
    dtype: torch.dtype = torch.float64
    softcap: float = 0.0
    sinks: bool = False
    dropout: tuple[float, int] | None = None  # probability and seed
    seed: int = 0
    options: dict[str, object] = field(default_factory=dict)  # keywords of parallel_attention

    def tensors(self) -> dict[str, torch.Tensor]:
        """q (T, H, D), k (T, K, D), v (T, K, V), dout (T, H, V) and sinks (H,) of the global stream."""
        generator = torch.Generator().manual_seed(self.seed)
        (H, K), (D, V), T = self.heads, self.dims, self.docs.total
        shapes = {"q": (T, H, D), "k": (T, K, D), "v": (T, K, V), "dout": (T, H, V), "sinks": (H,)}
        drawn = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
        return {name: x.to(self.dtype) for name, x in drawn.items()}


def dense_attention(case: Case, device: str = "cpu") -> dict[str, torch.Tensor]:
    """out, lse and the gradients of the whole stream, in float64."""
    x = {name: tensor.double().to(device) for name, tensor in case.tensors().items()}
    for name in ("q", "k", "v", "sinks"):
        x[name].requires_grad_()
    group = case.heads[0] // case.heads[1]
    k, v = x["k"].repeat_interleave(group, 1), x["v"].repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", x["q"], k) * case.dims[0] ** -0.5
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    allowed = case.docs.dense(case.mask).to(device)
    scores = scores.masked_fill(~allowed, float("-inf"))
    if case.sinks:
        sink = x["sinks"][:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, sink], -1)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - torch.where(lse.isinf(), 0.0, lse)[..., None])
    weights = weights[..., : len(k)]
    if case.dropout:
        p, seed = case.dropout
        index = torch.arange(len(k), device=device)
        weights = weights * kept_pairs(seed, p, index, index, 0, case.heads[0]) / (1 - p)
    out = torch.einsum("hqk,khv->qhv", weights, v)
    inside = allowed.any(-1)[:, None, None]
    (out * x["dout"] * inside).sum().backward()
    result = {"out": out.detach(), "lse": lse.detach(), "dq": x["q"].grad, "dk": x["k"].grad, "dv": x["v"].grad}
    if case.sinks:
        result["dsinks"] = x["sinks"].grad
    return result


def relative_error(x: torch.Tensor, reference: torch.Tensor) -> float:
    return ((x.double() - reference).norm() / reference.norm().clamp_min(1e-30)).item()
