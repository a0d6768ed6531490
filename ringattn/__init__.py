"""Exact sequence-parallel attention over packed documents."""

from ringattn.attention import ParallelAttention, parallel_attention
from ringattn.documents import Documents
from ringattn.mask import Mask
from ringattn.parallel.layout import Layout
from ringattn.parallel.mesh.mesh import SequenceMesh, init_mesh
from ringattn.parallel.mesh.shape import MeshShape

__version__ = "0.1.0"
__all__ = [
    "Documents",
    "Layout",
    "Mask",
    "MeshShape",
    "ParallelAttention",
    "SequenceMesh",
    "init_mesh",
    "parallel_attention",
]
