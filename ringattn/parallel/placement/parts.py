"""A stream whose documents are on several pairs of degrees, all over the same ranks: which part has which tokens. Pure.

Some documents are cheapest with their heads exchanged, others cut or whole on the ring axis. Each part is placed by
itself, over all ranks, and is balanced by itself: so their sum is.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from ringattn.documents import Documents
from ringattn.kernels.spec import Range
from ringattn.parallel.geometry.ranges import length, overlap, union
from ringattn.parallel.mesh.shape import MeshShape
from ringattn.parallel.placement.policies import Positions

Parts = Sequence[tuple[tuple[int, int], Sequence[int]]]  # (ring, ulysses), and numbers of documents


@dataclass(frozen=True)
class Part:
    """Some documents of a stream on one mesh.

    Arguments:
        docs: the documents, where they are in the whole stream.
        tokens: ascending ranges of the stream that are the part's: of its documents, and perhaps padding.
    """

    mesh: MeshShape
    docs: Documents
    tokens: tuple[Range, ...]


def resolve_parts(docs: Documents, mesh: MeshShape, parts: Parts) -> list[Part]:
    """The parts that `Layout(parts=...)` asks for. Padding goes to the one whose heads travel least.

    Raises ValueError for degrees that the mesh does not have, or documents that are not in exactly one part.
    """
    if not mesh.alternatives:
        raise ValueError(f"parts needs a mesh that leaves its degrees to layouts, init_mesh(sequence=...), got {mesh}")
    meshes = {(one.ring, one.ulysses): one for one in mesh.alternatives}
    for degrees, _ in parts:
        if tuple(degrees) not in meshes:
            raise ValueError(f"parts must name (ring, ulysses) of the mesh, {sorted(meshes)}, got {degrees!r}")
    if len({tuple(degrees) for degrees, _ in parts}) < len(parts):
        # They would share the message buffers of an axis, and be one part anyway.
        raise ValueError(f"parts must name each (ring, ulysses) once, got {[tuple(degrees) for degrees, _ in parts]}")
    named = sorted(number for _, numbers in parts for number in numbers)
    if named != list(range(len(docs))):
        wrong = {number for number in named if not 0 <= number < len(docs) or named.count(number) > 1}
        wrong |= set(range(len(docs))) - set(named)
        raise ValueError(
            f"parts must hold each of the {len(docs)} documents exactly once, got {len(named)} entries; wrong are "
            f"{sorted(wrong)[:6]}"
        )
    padded = min(range(len(parts)), key=lambda index: parts[index][0][1], default=0)
    return [
        _part(docs, meshes[degrees[0], degrees[1]], sorted(numbers), index == padded)
        for index, (degrees, numbers) in enumerate(parts)
    ]


def _part(docs: Documents, mesh: MeshShape, numbers: Sequence[int], padded: bool) -> Part:
    own = docs.select(numbers, [docs.starts[number] for number in numbers], docs.total)
    spans = [(start, start + size) for start, size in zip(own.starts, own.lengths, strict=True)]
    tokens = union([*spans, *(docs.padding if padded else ())])
    return Part(mesh, own, tuple(tokens))


def compact(docs: Documents, tokens: Sequence[Range]) -> Documents:
    """The documents, all inside the ranges `tokens`, in a stream of these tokens alone; none that is empty."""
    begins = [start for start, _ in tokens]
    before = [0, *accumulate(stop - start for start, stop in tokens)]
    held = [number for number, size in enumerate(docs.lengths) if size]
    at = [(bisect_right(begins, docs.starts[number]) - 1, docs.starts[number]) for number in held]
    starts = [before[index] + start - begins[index] for index, start in at]
    return docs.select(held, starts, length(tokens))


def spread(placement: Positions, tokens: Sequence[Range]) -> Positions:
    """A placement of the compact stream in indices of the whole one."""
    before = [0, *accumulate(stop - start for start, stop in tokens)]
    out = []
    for ranges in placement:
        mapped = []
        for begin, end in ranges:
            index = bisect_right(before, begin) - 1
            while index < len(tokens) and before[index] < end:
                first, last = overlap((before[index], before[index + 1]), (begin, end))
                shift = tokens[index][0] - before[index]
                mapped.append((first + shift, last + shift))
                index += 1
        out.append(tuple(mapped))
    return tuple(out)
