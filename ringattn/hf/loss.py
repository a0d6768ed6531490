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
from ringattn.hf.disguised import LossAsLogits
from ringattn.parallel.mesh.mesh import SequenceMesh

IGNORE_INDEX = -100


def shifted_labels(labels: Tensor, docs: Documents) -> Tensor:
    """Each token's target: the label of the next token of its document, -100 at ends and in padding. (T,) -> (T,)

    Raises ValueError for trees, where a token may have several next ones.
    """
    if docs.segments:
        raise ValueError(
            f"labels cannot be shifted along trees, where a token may be followed by several ({docs}): give "
            "shift_labels, each token's own target, or take the batch from shard_trees"
        )
    targets = torch.full_like(labels, IGNORE_INDEX)
    if docs.total:
        targets[:-1] = labels[1:]
    ends = [start + size - 1 for start, size in zip(docs.starts, docs.lengths, strict=True) if size]
    if ends:
        targets[torch.tensor(ends, device=labels.device)] = IGNORE_INDEX
    for start, stop in docs.padding:
        targets[start:stop] = IGNORE_INDEX
    return targets


def check_is_share(function: Callable[..., Any], vocabulary: int, device: torch.device) -> None:
    """Raises NotImplementedError unless a loss function is a share of a mean, which ranks may add up.

    That is: a sum over targets, each by itself, divided by `num_items_in_batch`, and 0 without any target. It is tried
    with four tokens of random logits, the same on every rank. A mean over the targets that one call sees, the usual
    thing to write, would be added up to a multiple of itself.
    """
    name = getattr(function, "__qualname__", type(function).__name__)
    wanted = (
        f"model.loss_function is {name}, and ranks add up what it returns for their tokens: it must be the sum over "
        "the targets in shift_labels, each by itself, divided by num_items_in_batch (a scalar tensor)"
    )
    logits = torch.randn(1, 4, vocabulary, generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.arange(4, device=device)[None] % vocabulary
    targets = labels.roll(-1, 1).index_fill(1, torch.tensor([1], device=device), IGNORE_INDEX)

    def share(tokens: slice, count: int, shift_labels: Tensor = targets) -> float:
        with torch.no_grad():
            value = function(
                logits=logits[:, tokens],
                labels=labels[:, tokens],
                vocab_size=vocabulary,
                shift_labels=shift_labels[:, tokens].contiguous(),
                num_items_in_batch=torch.tensor(count, device=device),
            )
        return float(value)

    try:
        whole, halved = share(slice(0, 4), 3), share(slice(0, 4), 6)
        parts = share(slice(0, 3), 3) + share(slice(3, 4), 3)
        none = share(slice(0, 4), 3, torch.full_like(targets, IGNORE_INDEX))
    except Exception as error:
        raise NotImplementedError(f"{wanted}; called like that it raises {type(error).__name__}: {error}") from error
    for what, found, right in (
        ("with twice num_items_in_batch", halved, whole / 2),
        ("of two parts, added up,", parts, whole),
        ("without a target", none, 0.0),
    ):
        if not abs(found - right) <= 1e-4 * max(1.0, abs(whole)):
            raise NotImplementedError(f"{wanted}; {what} it returns {found:.5g} instead of {right:.5g}")


def check_is_usual(function: Callable[..., Any]) -> None:
    """Raises NotImplementedError unless a loss function is the one that transformers gives to language models."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    if function is not ForCausalLMLoss:
        name = getattr(function, "__qualname__", type(function).__name__)
        raise NotImplementedError(
            f"loss_tile: model.loss_function is {name}, and a tiled loss is the cross entropy of transformers' "
            "ForCausalLMLoss; leave loss_tile out, or the loss function as it was"
        )


class GlobalLoss:
    """A model's loss function, as the mean over the targets of all ranks: of every part and every replica.

    `num_items_in_batch` counts the targets of this replica's whole stream (or of all the streams of an accumulated
    step); replicas are added up here. `result` is what was computed since `expect`. What is returned is a copy of it:
    models add to a loss in place, and it is to be seen whether one did.
    """

    def __init__(self, local: Callable[..., Tensor], mesh: SequenceMesh) -> None:
        self.local, self.mesh = local, mesh
        self.expect()

    def expect(self) -> None:
        """A forward pass begins."""
        self.result: Tensor | None = None
        self._returned: Tensor | None = None

    def is_whole(self, loss: Tensor | None) -> bool:
        """Whether a model's loss is what was computed here, nothing added and nothing left out; then forgets it."""
        result, returned = self.result, self._returned
        self.expect()
        if loss is None or result is None:
            return loss is result
        if loss is returned and not loss.is_inference():  # whose versions are not counted
            return loss._version == 0
        return bool((loss.detach() == result.detach()).all())  # a wrapper's cast, say

    def __deepcopy__(self, memo: dict[int, Any]) -> "GlobalLoss":
        return GlobalLoss(copy.deepcopy(self.local, memo), self.mesh)

    def __getstate__(self) -> dict[str, Any]:
        # Neither process groups nor graphs can be pickled.
        return self.__dict__ | {"mesh": None, "result": None, "_returned": None}

    def count(self, kwargs: dict[str, Any]) -> Tensor:
        """Targets of all replicas, or the sum of their weights, as a scalar of the batch's device; 1 in the place of 0.
        Collective over replicas."""
        if kwargs.get("num_items_in_batch") is None or kwargs.get("shift_labels") is None:
            raise ValueError("the loss of a sharded batch needs shift_labels and num_items_in_batch from shard_batch")
        number, device = kwargs["num_items_in_batch"], kwargs["shift_labels"].device
        if isinstance(number, Tensor):  # weights of targets have a sum that is no integer
            kind = torch.float64 if number.is_floating_point() else torch.int64
            targets = number.to(device, kind, copy=True)
        else:  # a copy from the host would wait for the device
            kind = torch.float64 if isinstance(number, float) else torch.int64
            targets = torch.full((), number, dtype=kind, device=device)
        if self.mesh.data > 1:
            dist.all_reduce(targets, group=self.mesh.device_mesh.get_group("data"))
        return torch.where(targets == 0, torch.ones_like(targets), targets)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        logits = args[0] if args else kwargs.get("logits")
        if isinstance(logits, LossAsLogits):
            local = logits.loss()
        else:
            local = self.local(*args, **kwargs | {"num_items_in_batch": self.count(kwargs)})
        self.result = _SumOverRanks.apply(local)
        self._returned = self.result.clone()
        return self._returned


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
