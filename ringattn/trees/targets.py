"""Targets as triples: in a tree a row may have several, one for each token that follows it, each with a weight.

m triples, T tokens of the stream, t tokens of this rank.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringattn.kept import kept
from ringattn.parallel.layout import Layout
from ringattn.parallel.mesh.mesh import SequenceMesh


@dataclass(frozen=True, eq=False)
class Targets:
    """Triples (row, label, weight): after row `rows[i]` comes `labels[i]`, whose loss counts `weights[i]` times.

    They live on the host, which cuts them in tiles. A row may have any number of them, in any order.

    Arguments:
        rows: (m,) integers, rows of the tokens that predict, in [0, tokens).
        labels: (m,) integers >= 0.
        weights: (m,) finite numbers of any sign; kept in float64.
        tokens: how many rows there are.

    Raises ValueError naming the argument.
    """

    rows: Tensor
    labels: Tensor
    weights: Tensor
    tokens: int

    def __post_init__(self) -> None:
        for name in ("rows", "labels"):
            object.__setattr__(self, name, _integers(name, getattr(self, name)))
        object.__setattr__(self, "weights", numbers("weights", self.weights))
        sizes = {name: tuple(getattr(self, name).shape) for name in ("rows", "labels", "weights")}
        if len(set(sizes.values())) > 1 or self.rows.dim() != 1:
            told = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise ValueError(f"rows, labels and weights must have one entry for each target, (m,), got {told}")
        if not isinstance(self.tokens, int) or isinstance(self.tokens, bool) or self.tokens < 0:
            raise ValueError(f"tokens must be a number of rows >= 0, got {self.tokens!r}")
        if not len(self):
            return
        if self.rows.min() < 0 or self.rows.max() >= self.tokens:
            raise ValueError(
                f"rows must be in [0, {self.tokens}), the tokens that there are, got {int(self.rows.min())} to "
                f"{int(self.rows.max())}"
            )
        if self.labels.min() < 0:
            raise ValueError(
                f"labels must be token ids >= 0, got {int(self.labels.min())}; leave out what is no target"
            )

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def items(self) -> float:
        """The sum of the weights: how many targets there are, each counted with its weight."""
        return float(self.weights.sum())

    @cached_property
    def labels_by_row(self) -> Tensor:
        """(tokens,) a label of each row, -100 where it has none: what asks only whether there are any."""
        out = torch.full((self.tokens,), -100, dtype=torch.int64, device="cpu")
        out[self.rows] = self.labels
        return out

    def of_tokens(self, tokens: int) -> "Targets":
        """The same triples among another number of rows."""
        return Targets(self.rows, self.labels, self.weights, tokens)

    def shard(self, layout: Layout) -> "Targets":
        """Those whose rows this rank holds, by its own rows. No communication.

        Raises ValueError if the layout is of another stream.
        """
        mine, rows = self._on(layout)
        return Targets(rows, self.labels[mine], self.weights[mine], layout.tokens())

    def unshard(self, x: Tensor, layout: Layout, grad: str = "same") -> Tensor:
        """The inverse of `shard`, for a value of each triple: (m of this rank,) -> (m,). Collective over the sequence
        ranks.

        Arguments:
            grad: what the gradient of the result means, as for `Layout.unshard`.
        """
        mine, _ = self._on(layout)
        if x.shape != mine.shape:
            raise ValueError(f"x must have one value for each of this rank's {len(mine)} targets, got {tuple(x.shape)}")
        if grad not in ("same", "partial"):
            raise ValueError(f'grad must be "same" or "partial", got {grad!r}')
        return _Unshard.apply(x, mine.to(x.device), layout, len(self), grad)

    def _on(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """Numbers and local rows of the triples that this rank owns, both (m of this rank,)."""
        if layout.docs.total != self.tokens:
            raise ValueError(f"layout must be of the {self.tokens} tokens of the targets, got {layout.docs}")

        def make() -> tuple[Tensor, Tensor]:
            place = torch.full((self.tokens,), -1, dtype=torch.int64, device="cpu")
            place[layout.indices()] = torch.arange(layout.tokens(), device="cpu")
            local = place[self.rows]
            mine = (local >= 0).nonzero()[:, 0]
            return mine, local[mine]

        return kept(layout, ("targets", self), make)


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mine: Tensor, layout: Layout, total: int, grad: str) -> Tensor:
        ctx.layout, ctx.grad = layout, grad
        ctx.save_for_backward(mine)
        whole = x.new_zeros(total)
        whole[mine] = x
        _add_up(whole, layout)  # each has one owner: what is added to it are zeros
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = grads
        if ctx.grad == "partial":
            grad = grad.clone(memory_format=torch.contiguous_format)
            _add_up(grad, ctx.layout)
        return grad[ctx.saved_tensors[0]], None, None, None, None


def _add_up(x: Tensor, layout: Layout) -> None:
    mesh = layout.mesh
    if mesh.sequence_size == 1:
        return
    if not isinstance(mesh, SequenceMesh):
        raise ValueError("unshard needs a layout on a SequenceMesh of running processes, got a MeshShape")
    dist.all_reduce(x, group=mesh.sequence_group)


def _integers(name: str, values: Any) -> Tensor:
    try:
        out = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be integers, got {values!r} ({error})") from None
    if out.numel() and (out.is_floating_point() or out.is_complex() or out.dtype == torch.bool):
        raise ValueError(f"{name} must be integers, got {out.dtype}")
    if isinstance(values, list | tuple) and bool in set(map(type, values)):  # which Python counts as 0 and 1
        raise ValueError(f"{name} must be integers, got {str(list(values))[:60]}")
    return out.to(torch.int64)


def numbers(name: str, values: Any) -> Tensor:
    """Weights on the host in float64. Raises ValueError naming them for anything but finite numbers."""
    if isinstance(values, Tensor) and values.is_complex():
        raise ValueError(f"{name} must be finite numbers, got {values.dtype}")
    try:
        out = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be finite numbers, got {values!r} ({error})") from None
    if not bool(torch.isfinite(out).all()):
        raise ValueError(f"{name} must be finite numbers, got {out.flatten()[:6].tolist()}")
    return out
