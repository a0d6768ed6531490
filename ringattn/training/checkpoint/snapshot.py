"""What a rank saves: nested values taken apart into plain tensors and a JSON text that says what they were."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ringattn.training.checkpoint.tensors import file_size

CODES, SCALE, QMAP = "#codes", "#scale", "#qmap"
"""Ends of the names of what moments of 8 bits are made of."""


@dataclass(frozen=True)
class Snapshot:
    """One rank's part of a checkpoint.

    Arguments:
        tensors: plain ones by name, where they are; they are those of the training, not copies.
        index: JSON. `tree` has the values that are no tensors, and a tensor's name in its place; `rows` has the shape
            of the whole, and the first row of it, for each tensor that is a shard; `signed` is of moments of 8 bits.
    """

    tensors: Mapping[str, Tensor]
    index: str

    @property
    def file_size(self) -> int:
        """Bytes of its file."""
        return file_size(self.tensors, self.index)


@torch.no_grad()
def snapshot_of(tree: Mapping[str, Any]) -> Snapshot:
    """Takes nested dicts, lists and tuples of tensors and plain values apart. Nothing is copied.

    Raises TypeError for a value of another kind, naming its place.
    """
    taken = _Apart()
    shape = taken.value(tree, "")
    return Snapshot(taken.tensors, json.dumps({"tree": shape, "rows": taken.rows, "signed": taken.signed}))


class _Apart:
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.rows: dict[str, tuple[list[int], int]] = {}
        self.signed: dict[str, bool] = {}

    def value(self, value: Any, place: str) -> Any:
        """What stands in JSON for a value."""
        if isinstance(value, Tensor):
            self._tensor(value, place)
            return {"tensor": place}
        if isinstance(value, Mapping):
            return {"dict": [[_key(key, place), self.value(one, below(place, key))] for key, one in value.items()]}
        if isinstance(value, tuple | list):
            listed = "list" if isinstance(value, list) else "tuple"
            return {listed: [self.value(one, below(place, number)) for number, one in enumerate(value)]}
        if isinstance(value, bool) or value is None:
            return value
        for kind in (int, float, str):
            if isinstance(value, kind):
                return kind(value)  # without what an enumeration adds
        raise TypeError(f"a checkpoint cannot hold {place}, a {type(value).__name__}")

    def _tensor(self, tensor: Tensor, name: str) -> None:
        assert name not in self.tensors, f"two tensors are named {name}"
        if isinstance(tensor, DTensor):
            self.rows[name] = [*tensor.shape], first_row(tensor)
            tensor = tensor.to_local()
        if is_blocked(tensor):
            self.signed[name] = tensor.signed  # type: ignore[attr-defined]
            for end, part in zip((CODES, SCALE, QMAP), parts_of(tensor), strict=True):
                self.tensors[name + end] = part
        else:
            self.tensors[name] = tensor.detach()


def below(place: str, key: Any) -> str:
    """The name of what stands at a key of something with a name."""
    return f"{place}/{key}" if place else str(key)


def _key(key: Any, place: str) -> str | int:
    if isinstance(key, str | int):
        return key
    raise TypeError(f"a checkpoint cannot hold {place}, which has the key {key!r}")


def put_together(shape: Any, tensor: Any) -> Any:
    """The values that a `tree` of an index stands for.

    Arguments:
        tensor: gives the tensor of a name.

    Raises ValueError for what no tree is.
    """
    if not isinstance(shape, dict):
        return shape
    ((kind, inner),) = shape.items()
    if kind == "tensor":
        return tensor(inner)
    if kind == "dict":
        return {key: put_together(value, tensor) for key, value in inner}
    if kind not in ("list", "tuple"):
        raise ValueError(f"no part of a tree: {kind}")
    values = [put_together(value, tensor) for value in inner]
    return values if kind == "list" else tuple(values)


def names_in(shape: Any) -> Iterator[str]:
    """Names of all tensors of a `tree`."""
    if isinstance(shape, dict):
        ((kind, inner),) = shape.items()
        if kind == "tensor":
            yield inner
        else:
            for value in inner:
                yield from names_in(value[1] if kind == "dict" else value)


def first_row(tensor: DTensor) -> int:
    """Where a rank's rows begin in the whole tensor, which is sharded by rows over one mesh axis, as FSDP2 does it:
    every rank has as many, the last ones fewer or none."""
    (placement,), count = tensor.placements, tensor.device_mesh.size()
    assert placement.is_shard(0), f"only rows are sharded, not {placement}"
    each = math.ceil(tensor.shape[0] / count)
    start = min(each * tensor.device_mesh.get_local_rank(), tensor.shape[0])
    assert tensor.to_local().shape[0] == min(each, tensor.shape[0] - start)
    return start


# Moments of 8 bits, which torchao keeps in a kind of tensor of its own.


def is_blocked(tensor: Tensor) -> bool:
    """Whether a tensor is torchao's of 8 bits. torchao is not imported for it."""
    return type(tensor).__name__ == "OptimState8bit"


def parts_of(tensor: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (of the tensor's shape, uint8), a scale for each block (float32), and what the codes mean."""
    return tensor.codes, tensor.scale, tensor.qmap


def blocked(codes: Tensor, scale: Tensor, qmap: Tensor, signed: bool) -> Tensor:
    """The tensor of 8 bits that has these parts."""
    from torchao.optim.subclass_8bit import OptimState8bit

    made: Tensor = OptimState8bit(codes, scale, qmap, signed)
    return made


def unblocked(tensor: Any) -> Tensor:
    """Its numbers in float32."""
    wide: Tensor = tensor.dequantize()
    return wide.to(torch.float32)
