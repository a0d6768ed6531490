"""Layout: which rank holds which tokens of a packed stream, and the tensors' way there and back.

T tokens of the stream, t tokens of this rank.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from ringattn.documents import Documents
from ringattn.kept import kept
from ringattn.kernels.spec import Range, to_device
from ringattn.mask import Mask
from ringattn.numbered import number_of
from ringattn.parallel.choice.degrees import choose_degrees
from ringattn.parallel.geometry.ranges import length, overlap, touching
from ringattn.parallel.machine.machine import Machine
from ringattn.parallel.mesh.mesh import SequenceMesh
from ringattn.parallel.mesh.shape import MeshShape
from ringattn.parallel.placement.parts import Parts, resolve_parts
from ringattn.parallel.placement.placement import POLICIES, Placement, resolved
from ringattn.parallel.placement.policies import Positions
from ringattn.parallel.plan.shape import Shape
from ringattn.tracing import untraced


class Layout:
    """The placement of `docs` over the sequence ranks of `mesh`. Pure integers: no communication, same on every rank.

    Arguments:
        docs: the documents of the global stream.
        mesh: a `SequenceMesh`, or a `MeshShape` for planning without processes. One with `alternatives` leaves the
            degrees to the layout: those are taken whose attention is predicted to be fastest.
        policy: "contiguous" (equal runs of the stream), "zigzag" (every document cut over all ring positions),
            "balanced" (equal tokens and equal cost with few cuts), or "auto": balanced where there is a ring axis, else
            contiguous.
        mask: the mask whose cost "balanced" evens out, default causal; any mask can be computed on any layout. For a
            model that has several, pairs (mask, number of layers), whose costs are added.
        machine: "balanced" evens out kernel time on it instead of the number of allowed pairs, which is not the same
            for short documents; default: none, with "auto" the mesh's.
        head_dim: of the kernels that are timed.
        heads: query and key heads of the model, by which degrees are chosen.
        speeds: of each ring position, positive, for "balanced" and "auto": tokens and cost are in proportion to them.
        parts: on a mesh with `alternatives`, which degrees each document gets, in place of the layout's own choice:
            pairs ((ring, ulysses), numbers of documents), every document in one of them.

    Its `parts` are one placement or more, each of some of the documents over all ranks. A rank holds the tokens of one
    after those of another. `mesh` is the mesh of a single part, and that with the alternatives where there are several.
    A layout is not to be changed. It is no dataclass because FSDP takes those in a model's keywords apart, and copies
    them. Raises ValueError for a wrong argument.
    """

    __slots__ = ("__dict__", "__weakref__", "_number")  # what a number keeps alive shares all but the number

    @untraced
    def __init__(
        self,
        docs: Documents,
        mesh: MeshShape,
        policy: str = "auto",
        mask: Mask | Sequence[tuple[Mask, float]] | None = None,
        *,
        machine: Machine | None = None,
        head_dim: int = 128,
        heads: tuple[int, int] = (32, 8),
        speeds: Sequence[float] | None = None,
        parts: Parts | None = None,
    ) -> None:
        if not isinstance(docs, Documents):
            raise ValueError(f"docs must be Documents, got {type(docs).__name__}; build one with Documents(lengths)")
        if not isinstance(mesh, MeshShape):
            raise ValueError(f"mesh must come from init_mesh (or be a MeshShape), got {type(mesh).__name__}")
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
        self.docs, self.mesh, self.policy, self.reason = docs, mesh, policy, ""
        self.masks = _masks(mask)
        for one, _ in self.masks:
            docs.check_mask(one)
        self.mask = self.masks[0][0]

        def placed_on(one: MeshShape, some: Documents = docs, tokens: Sequence[Range] | None = None) -> Placement:
            return Placement(
                some, one, policy, self.masks, machine=machine, head_dim=head_dim, speeds=speeds, tokens=tokens
            )

        def parted(wanted: Parts) -> tuple[Placement, ...]:
            return tuple(placed_on(part.mesh, part.docs, part.tokens) for part in resolve_parts(docs, mesh, wanted))

        if speeds is not None and (parts is not None or mesh.alternatives):
            raise ValueError("speeds are of the positions of one ring, and here documents may be on several meshes")
        if parts is not None:
            self.parts = parted(parts)
        elif mesh.alternatives:
            # The other policies say themselves where each token is; and what parts trees best is not priced.
            mixed = parted if policy in ("auto", "balanced") and not docs.segmented else None
            shape = Shape(*heads, head_dim, head_dim, 2)
            chosen = choose_degrees(mesh.alternatives, placed_on, self.masks, shape, machine, mixed)
            self.parts, self.reason = chosen.parts, chosen.reason
        else:
            self.parts = (placed_on(mesh),)
        if len(self.parts) == 1:
            self.mesh = self.parts[0].mesh
        self._take_number()

    def _take_number(self) -> None:
        """A tensor that stands for this layout in compiled graphs, and keeps a twin with the same state alive."""
        twin = object.__new__(Layout)
        twin.__dict__ = self.__dict__
        self._number = number_of(twin)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: numbers belong to one process, and what was planned may hold its process groups."""
        return self.__dict__ | {"_kept": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._take_number()

    def is_on(self, mesh: MeshShape) -> bool:
        """Whether attention on `mesh` may take this layout: made for it, or for one of its alternatives."""
        return self.mesh is mesh or self.mesh == mesh or self.mesh in mesh.alternatives

    @property
    def resolved_policy(self) -> str:
        """What "auto" stands for on this mesh."""
        return resolved(self.policy, self.mesh)

    @cached_property
    def positions(self) -> Positions:
        """Ordered global ranges `(start, stop)` of every ring position; of every rank where there are several parts."""
        if len(self.parts) == 1:
            return self.parts[0].positions
        return tuple(self.ranges(rank) for rank in range(self.mesh.sequence_size))

    @cached_property
    def position_sizes(self) -> tuple[int, ...]:
        return tuple(length(ranges) for ranges in self.positions)

    def ranges(self, rank: int | None = None) -> tuple[Range, ...]:
        """Ordered global ranges held by a sequence rank (default: this one)."""
        rank = self._rank(rank)
        if len(self.parts) == 1:
            return self.parts[0].ranges(rank)
        return touching(span for part in self.parts for span in part.ranges(rank))

    def tokens(self, rank: int | None = None) -> int:
        """Number of tokens held by a sequence rank (default: this one)."""
        rank = self._rank(rank)
        return sum(part.tokens(rank) for part in self.parts)

    def indices(self, rank: int | None = None) -> torch.Tensor:
        """Global indices held by a sequence rank (default: this one), in its local order: (t,) int64 on the host."""
        return _concatenated([torch.arange(start, stop, device="cpu") for start, stop in self.ranges(rank)])

    def position_ids(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Position inside its document of each local token, of a tree on its path: (t,) int64.

        Padding counts from 0 in every run.
        """
        runs = self.docs.position_runs
        starts = [start for start, _, _ in runs]
        parts = []
        for begin, end in self.ranges():
            index = max(0, bisect_right(starts, begin) - 1)
            while index < len(runs) and runs[index][0] < end:
                start, stop, position = runs[index]
                first, last = overlap((start, stop), (begin, end))
                parts.append(torch.arange(first - start + position, last - start + position, device="cpu"))
                index += 1
        return to_device(_concatenated(parts), torch.device(device or "cpu"))

    def shard(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """This rank's tokens of a global tensor: (..., T, ...) -> (..., t, ...). Differentiable, no communication."""
        if x.shape[dim] != self.docs.total:
            raise ValueError(
                f"x must have the {self.docs.total} tokens of the stream in dim {dim}, got shape {tuple(x.shape)}"
            )
        parts = [x.narrow(dim, start, stop - start) for start, stop in self.ranges()]
        return torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0)

    def unshard(self, x: torch.Tensor, dim: int = 0, grad: str = "same") -> torch.Tensor:
        """The inverse of `shard`: (..., t, ...) -> (..., T, ...) on every sequence rank. Collective over them.

        Arguments:
            grad: what the gradient of the result means. "same": every rank computes the same thing from it, as one
                process would, so each takes its own rows and nothing is sent. "partial": ranks compute different
                things whose sum counts (a share of a loss), so the gradients are added over the ranks.
        """
        if x.shape[dim] != self.tokens():
            raise ValueError(
                f"x must have the {self.tokens()} tokens of sequence rank {self.mesh.sequence_rank} in dim {dim}, got "
                f"shape {tuple(x.shape)}"
            )
        if grad not in ("same", "partial"):
            raise ValueError(f'grad must be "same" or "partial", got {grad!r}')
        return _Unshard.apply(x.movedim(dim, 0), self, grad).movedim(0, dim)

    def _gather_order(self, device: torch.device) -> torch.Tensor:
        """Row of each global token in the ranks' tensors laid end to end, each padded to the longest. Kept."""

        def make() -> torch.Tensor:
            order = torch.empty(self.docs.total, dtype=torch.int64, device="cpu")
            for rank in range(self.mesh.sequence_size):
                indices = self.indices(rank)
                order[indices] = torch.arange(len(indices), device="cpu") + rank * self._longest
            return to_device(order, device)

        return kept(self, ("gather order", device), make)

    @cached_property
    def _longest(self) -> int:
        return max(self.tokens(rank) for rank in range(self.mesh.sequence_size))

    def _rank(self, rank: int | None) -> int:
        rank = self.mesh.sequence_rank if rank is None else rank
        if not 0 <= rank < self.mesh.sequence_size:
            raise ValueError(f"rank must be in [0, {self.mesh.sequence_size}), got {rank}")
        return rank

    def __str__(self) -> str:
        if len(self.parts) == 1:
            return str(self.parts[0])
        head = f"{self.docs} on {self.mesh.sequence_size} ranks in {len(self.parts)} parts"
        return "\n".join([head, *(f"  {line}" for part in self.parts for line in str(part).splitlines())])


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layout: Layout, grad: str) -> torch.Tensor:
        ctx.layout, ctx.grad = layout, grad
        mesh = layout.mesh
        if mesh.sequence_size == 1:
            return x.index_select(0, layout._gather_order(x.device))
        if not isinstance(mesh, SequenceMesh):
            raise ValueError("unshard needs a layout on a SequenceMesh of running processes, got a MeshShape")
        padded = x.new_zeros(layout._longest, *x.shape[1:])
        padded[: len(x)] = x
        rows = x.new_empty(mesh.sequence_size, *padded.shape)
        dist.all_gather(list(rows.unbind()), padded, group=mesh.sequence_group)
        return rows.flatten(0, 1).index_select(0, layout._gather_order(x.device))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,) = grads
        if ctx.grad == "partial" and ctx.layout.mesh.sequence_size > 1:
            grad = grad.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(grad, group=ctx.layout.mesh.sequence_group)
        return ctx.layout.shard(grad, 0), None, None


def _masks(mask: Mask | Sequence[tuple[Mask, float]] | None) -> tuple[tuple[Mask, float], ...]:
    """Masks with the number of layers that each has."""
    if mask is None or isinstance(mask, Mask):
        return ((mask or Mask(), 1.0),)
    pairs: list[Any] = [tuple(pair) if isinstance(pair, tuple | list) else (pair,) for pair in mask]
    for pair in pairs:
        numbers = len(pair) == 2 and isinstance(pair[1], int | float) and pair[1] > 0
        if not numbers or not isinstance(pair[0], Mask):
            raise ValueError(f"mask must be a Mask, or pairs (Mask, number of layers > 0), got {pair!r}")
    if not pairs:
        raise ValueError("mask must be a Mask, or pairs (Mask, number of layers > 0), got none")
    return tuple((pair[0], float(pair[1])) for pair in pairs)


def _concatenated(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device="cpu")
