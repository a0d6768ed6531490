"""Weights of DeepSpeed's third stage, put together from the flat pieces that its ranks saved.

Every rank holds a piece of each trained tensor: with P ranks a P-th of its numbers, rounded up, the last pieces filled
up with zeros. A rank's pieces stand one behind the other in the order of the optimizer's groups, in one or more flat
tensors of float32 (Rajbhandari et al., arXiv 1910.02054; laid out as DeepSpeed's own `zero_to_fp32.py` reads it, whose
files are pickles: these are safetensors).
"""

from bisect import bisect_right
from itertools import accumulate

import torch
from torch import Tensor, nn

from ringattn.training.checkpoint.marker import BadCheckpoint
from ringattn.training.checkpoint.saved_state import SavedState
from ringattn.training.checkpoint.snapshot import below
from ringattn.training.engines.interface import STATE
from ringattn.training.model.models import parameter_groups

_FLAT = ("optimizer_state_dict", "fp32_flat_groups")


def flat_place(rank: int) -> tuple[str, ...]:
    """The keys below which a rank's flat tensors stand, by the name that DeepSpeed's file of them has."""
    return STATE, f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", *_FLAT


class FlatPieces:
    """The trained tensors of a model by their names, read one at a time.

    Arguments:
        saved: the checkpoint.
        model: as it was trained, on the meta device.
        ranks: that wrote the checkpoint.

    Raises BadCheckpoint where the flat tensors of a rank are not those of this model.
    """

    def __init__(self, saved: SavedState, model: nn.Module, ranks: int) -> None:
        self._saved, self._ranks = saved, ranks
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        trained = [one for group in parameter_groups(model, 0.0) for one in group["params"]]
        self._shapes = {names[id(one)]: one.shape for one in trained}
        ends = accumulate(self._part(name) for name in self._shapes)
        self._starts = dict(zip(self._shapes, [0, *ends], strict=False))
        total = sum(map(self._part, self._shapes))
        self._flat = [self._flat_of(rank, total) for rank in range(ranks)]

    def names(self) -> set[str]:
        """Of the trained tensors, tied ones once."""
        return set(self._shapes)

    def whole(self, name: str) -> Tensor:
        """A tensor, in float32."""
        shape, start, part = self._shapes[name], self._starts[name], self._part(name)
        pieces = [self._piece(rank, start, start + part) for rank in range(self._ranks)]
        return torch.cat(pieces)[: shape.numel()].view(shape)

    def _part(self, name: str) -> int:
        """Numbers of a tensor that each rank holds."""
        return -(-self._shapes[name].numel() // self._ranks)

    def _flat_of(self, rank: int, total: int) -> tuple[list[str], list[int]]:
        """The flat tensors of a rank, and where each begins and the last one ends."""
        place = "/".join(flat_place(rank))
        try:
            keys = self._saved.names(*flat_place(rank))
        except KeyError:
            raise BadCheckpoint(f"the checkpoint of {self._ranks} ranks does not hold {place}") from None
        names = [below(place, key) for key in keys]
        starts = [0, *accumulate(self._saved.shape(name)[0] for name in names)]
        if starts[-1] != total:
            raise BadCheckpoint(f"{place} holds {starts[-1]:,} numbers, a rank's pieces of the model have {total:,}")
        return names, starts

    def _piece(self, rank: int, start: int, stop: int) -> Tensor:
        """Numbers `[start, stop)` of a rank's flat tensors, laid end to end."""
        names, starts = self._flat[rank]
        found, at = [], bisect_right(starts, start) - 1
        while start < stop:
            end = min(stop, starts[at + 1])
            found.append(self._saved.rows(names[at], start - starts[at], end - starts[at]))
            start, at = end, at + 1
        return torch.cat(found) if found else torch.zeros(0)
