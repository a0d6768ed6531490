"""Muon for the matrices of a model whose parameters are sharded by rows, AdamW for the rest.

Muon (Jordan et al., kellerjordan.github.io/posts/muon) makes each matrix's momentum orthogonal before it is applied,
for which the whole matrix is needed. As many matrices are taken at a time as there are ranks: each rank gets all rows
of one of them, makes it orthogonal, and gives the rows back. (torch.optim.Muon on sharded parameters gathers factors or
reduces products in each of its ten multiplications, and fails for a matrix with fewer rows than ranks.) Updates are
scaled to the size of AdamW's (Liu et al., Moonlight, arXiv 2502.16982), so that one learning rate and weight decay
serve both.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ringattn.training.engines.interface import EngineOptions

ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, as Jordan tuned them
_EPS = 1e-7
_OF_MUON = "matrices"  # the key of groups that says whose they are


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that Muon is for: those that are trained and have two axes, but embedding and head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    apart = {id(p) for one in ends if one is not None for p in one.parameters()}
    return [p for p in model.parameters() if p.requires_grad and p.dim() == 2 and id(p) not in apart]


def muon(model: nn.Module, options: EngineOptions) -> torch.optim.Optimizer:
    """Muon with `options.momentum` for `matrices`, AdamW for embedding, head, norms and biases."""
    wide = matrices(model)
    taken = {id(p) for p in wide}
    trained = [p for p in model.parameters() if p.requires_grad]
    rest = [p for p in trained if p.dim() >= 2 and id(p) not in taken]
    small = [p for p in trained if p.dim() < 2]
    decay = options.weight_decay
    groups: list[dict[str, Any]] = [
        {"params": wide, "weight_decay": decay, _OF_MUON: True},
        {"params": rest, "weight_decay": decay, _OF_MUON: False},
        {"params": small, "weight_decay": 0.0, _OF_MUON: False},
    ]
    assert options.momentum is not None
    return Muon([group for group in groups if group["params"]], options)


class Muon(torch.optim.AdamW):
    """A step is collective over the ranks that share the parameters. Nothing waits for the device."""

    def __init__(self, groups: list[dict[str, Any]], options: EngineOptions) -> None:
        super().__init__(groups, lr=0.0, betas=options.betas, eps=options.eps, fused=True)
        self._momentum, self._device = options.momentum or 0.0, options.device

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        every = self.param_groups
        try:
            self.param_groups = [group for group in every if not group[_OF_MUON]]
            super().step(closure)
        finally:
            self.param_groups = every
        for group in every:
            if group[_OF_MUON]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        # Those of one size side by side: ranks then have as much to do in each round.
        parameters.sort(key=lambda p: -p.numel())
        count = _shares(parameters[0]) if parameters else 1
        for first in range(0, len(parameters), count):
            self._step_some(parameters[first : first + count], group)  # what is made on the way goes with each call

    def _step_some(self, some: Sequence[nn.Parameter], group: dict[str, Any]) -> None:
        pieces = [self._momentum_of(p).to(self._device) for p in some]
        for p, update in zip(some, orthogonal(pieces, some), strict=True):
            self._apply(p, update, group)

    def _momentum_of(self, p: nn.Parameter) -> Tensor:
        """Nesterov's momentum of this rank's rows, in bfloat16, as the iteration takes it."""
        state, grad = self.state[p], _local(p.grad)
        if not state:
            state["step"] = torch.zeros((), device=grad.device)
            state["momentum_buffer"] = torch.zeros_like(p)
        ok = self._ok(grad)
        state["step"] += ok
        buffer = _local(state["momentum_buffer"])
        grad = torch.where(ok > 0, grad, 0.0)
        buffer.lerp_(grad, (1 - self._momentum) * ok)
        return grad.lerp(buffer, self._momentum).to(torch.bfloat16)

    def _apply(self, p: nn.Parameter, update: Tensor, group: dict[str, Any]) -> None:
        local, rate = _local(p), group["lr"]
        ok = self._ok(local)
        size = 0.2 * math.sqrt(max(p.shape))  # an orthogonal matrix times this has the root mean square of AdamW's
        local.mul_(1 - rate * group["weight_decay"] * ok)
        local.sub_(update.to(local.device, local.dtype) * (rate * size * ok))

    def _ok(self, like: Tensor) -> Tensor:
        """1 where the step counts, 0 where its gradients are not finite (`step_if_finite` says so)."""
        found: Tensor | None = getattr(self, "found_inf", None)
        return torch.ones((), device=like.device) if found is None else 1 - found.to(like.device)


def orthogonal(pieces: Sequence[Tensor], whole: Sequence[Tensor]) -> list[Tensor]:
    """This rank's rows of matrices made orthogonal, at most as many matrices as ranks. Collective.

    Arguments:
        pieces: this rank's rows of each matrix, bfloat16, where collectives work.
        whole: parameters with the shapes of the matrices, sharded by rows in the same way.
    """
    count, group = _shares(whole[0]), _group(whole[0])
    if count == 1:
        return [orthogonal_matrix(piece) for piece in pieces]
    rank, width = dist.get_rank(group), [p.shape[1] for p in whole]
    mine = whole[rank].shape if rank < len(whole) else None
    given = [piece.numel() for piece in pieces] + [0] * (count - len(pieces))
    got = [rows_of(mine[0], count, one) * mine[1] if mine else 0 for one in range(count)]
    sent = torch.cat([piece.reshape(-1) for piece in pieces])
    matrix = sent.new_empty(sum(got))
    dist.all_to_all_single(matrix, sent, got, given, group=group)
    if mine:
        matrix = orthogonal_matrix(matrix.view(mine)).reshape(-1)
    back = torch.empty_like(sent)
    dist.all_to_all_single(back, matrix.contiguous(), given, got, group=group)
    parts = back.split(given[: len(pieces)])
    return [part.view(-1, columns) for part, columns in zip(parts, width, strict=True)]


def orthogonal_matrix(matrix: Tensor) -> Tensor:
    """The nearest orthogonal matrix, nearly: singular values come to lie between 0.7 and 1.2 (Newton–Schulz).

    Arguments:
        matrix: two axes, bfloat16.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=_EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def rows_of(total: int, ranks: int, rank: int) -> int:
    """How many of a matrix's rows FSDP2 gives to a rank."""
    each = -(-total // ranks)
    return max(0, min(each, total - rank * each))


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shares(p: Tensor) -> int:
    return p.device_mesh.size() if isinstance(p, DTensor) else 1


def _group(p: Tensor) -> Any:
    return p.device_mesh.get_group() if isinstance(p, DTensor) else None
