"""Layouts and plans that are made ahead of the step that needs them, perhaps in another process.

A layout and its plans are integers. What they need of a mesh are its numbers, so a process without ranks and devices
can make them (on `SequenceMesh.shape`), and the way back is a pickle in which a mesh is named by its degrees and not
copied: what is read is on the mesh of the reader.
"""

import io
import pickle
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

from ringattn.kept import keep, kept_keys
from ringattn.parallel.layout import Layout
from ringattn.parallel.mesh.shape import MeshShape
from ringattn.parallel.plan.plan import PartedPlan
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.planning.planner import PlansKey, plan_parts
from ringattn.settings import AttentionOptions

Plans = tuple[tuple[PlansKey, PartedPlan], ...]


class Attention(NamedTuple):
    """What plans of any layout are made for: a kind of attention of a model."""

    shape: Shape
    options: AttentionOptions


def attentions_of(layout: Layout) -> tuple[Attention, ...]:
    """The kinds of attention that were planned on a layout: those of a model, once it ran on it."""
    return tuple(dict.fromkeys(Attention(key.shape, key.options) for key in _keys(layout)))


def plan_ahead(layout: Layout, attentions: Iterable[Attention]) -> Plans:
    """The plans that some kinds of attention will ask for on this layout, for `install`.

    Raises ValueError where `parallel_attention` would for its options.
    """
    for attention in attentions:
        plan_parts(layout, *attention)
    return tuple((key, plan_parts(layout, key.shape, key.options)) for key in _keys(layout))


def install(layout: Layout, plans: Iterable[tuple[Hashable, Any]]) -> None:
    """Keep plans with the layout that they were made for, or with one that was made from the same arguments.

    Arguments:
        plans: of attention, or of whatever keeps its plans with layouts, each with the key that it is kept by.
    """
    for key, plan in plans:
        keep(layout, key, plan)


def _keys(layout: Layout) -> list[PlansKey]:
    return [key for key in kept_keys(layout) if isinstance(key, PlansKey)]


def to_bytes(value: Any) -> bytes:
    """A pickle of layouts, plans and whatever they stand in, without the meshes."""
    file = io.BytesIO()
    _Writer(file, pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


def from_bytes(data: bytes, mesh: MeshShape) -> Any:
    """What `to_bytes` wrote, on `mesh` or on those of its alternatives that layouts took."""
    return _Reader(data, mesh).load()


class _Writer(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return _name(value) if isinstance(value, MeshShape) else None


class _Reader(pickle.Unpickler):
    def __init__(self, data: bytes, mesh: MeshShape) -> None:
        super().__init__(io.BytesIO(data))
        self._meshes = {_name(one): one for one in (mesh, *mesh.alternatives)}

    def persistent_load(self, name: Any) -> MeshShape:
        return self._meshes[name]


def _name(mesh: MeshShape) -> tuple[int, int, bool]:
    """A mesh that leaves the degrees to layouts has those of one of its alternatives, but is another one."""
    return mesh.ring, mesh.ulysses, bool(mesh.alternatives)
