"""The ranks: data × ring × ulysses."""

from ringattn.parallel.mesh.mesh import TRANSPORTS, SequenceMesh, init_mesh
from ringattn.parallel.mesh.shape import MeshShape, resolve_mesh

__all__ = ["TRANSPORTS", "MeshShape", "SequenceMesh", "init_mesh", "resolve_mesh"]
