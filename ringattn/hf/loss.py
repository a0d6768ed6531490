"""The loss of a batch that is spread over ranks: the mean over all its targets, with the gradient of that mean.

T tokens of the stream.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringattn.documents import Documents
from ringattn.parallel.mesh import SequenceMesh

IGNORE_INDEX = -100


def shifted_labels(labels: Tensor, docs: Documents) -> Tensor:
    """Each token's target: the label of the next token of its document, -100 at ends and in padding. (T,) -> (T,)"""
    targets = torch.full_like(labels, IGNORE_INDEX)
    if docs.total:
        targets[:-1] = labels[1:]
    ends = [start + size - 1 for start, size in zip(docs.starts, docs.lengths, strict=True) if size]
    if ends:
        targets[torch.tensor(ends, device=labels.device)] = IGNORE_INDEX
    for start, stop in docs.padding:
        targets[start:stop] = IGNORE_INDEX
    return targets


class GlobalLoss:
    """A model's loss function, as the mean over the targets of all ranks: of every part and every replica.

    `num_items_in_batch` counts the targets of this replica's whole stream (or of all the streams of an accumulated
    step); replicas are added up here. `called` tells whether the model computed its loss here at all.
    """

    def __init__(self, local: Callable[..., Tensor], mesh: SequenceMesh) -> None:
        self.local, self.mesh, self.called = local, mesh, False

    def __deepcopy__(self, memo: dict[int, Any]) -> "GlobalLoss":
        return GlobalLoss(copy.deepcopy(self.local, memo), self.mesh)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"mesh": None}  # process groups cannot be pickled

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.called = True
        if kwargs.get("num_items_in_batch") is None or kwargs.get("shift_labels") is None:
            raise ValueError("the loss of a sharded batch needs shift_labels and num_items_in_batch from shard_batch")
        targets = torch.as_tensor(kwargs["num_items_in_batch"], device=kwargs["shift_labels"].device).clone()
        if self.mesh.data > 1:
            dist.all_reduce(targets, group=self.mesh.device_mesh.get_group("data"))
        kwargs["num_items_in_batch"] = targets.clamp_min(1)
        return _SumOverRanks.apply(self.local(*args, **kwargs))


class _SumOverRanks(torch.autograd.Function):
    """The sum of all ranks' values; the gradient is scaled for engines that average gradients over all ranks."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        total = local.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * dist.get_world_size()
