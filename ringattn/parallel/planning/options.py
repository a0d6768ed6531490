"""Which options a mesh can run."""

from ringattn.parallel.mesh.shape import MeshShape
from ringattn.parallel.schedules.candidates import schedule_names
from ringattn.settings import AttentionOptions


def scheme_names() -> tuple[str, ...]:
    """All that `scheme=` may be: the schedules, and what says which axes there are."""
    return tuple(dict.fromkeys(("auto", "ring", "ulysses", "hybrid", *schedule_names())))


def check_scheme(options: AttentionOptions, mesh: MeshShape, parts: int = 1) -> None:
    """Check options, by themselves and for the axes of a mesh.

    Arguments:
        parts: of the layout, each with a mesh of its own.

    Raises ValueError naming the argument, for a scheme with the degrees of the mesh.
    """
    scheme = options.scheme
    if scheme not in scheme_names():
        raise ValueError(f"scheme must be one of {', '.join(scheme_names())}, got {scheme!r}")
    options.check()
    if parts > 1 and scheme != "auto":
        raise ValueError(f'scheme must be "auto" where documents are on several meshes ({parts} parts), got "{scheme}"')
    degrees = f"the mesh has ring={mesh.ring} and ulysses={mesh.ulysses}"
    if mesh.sequence_size > 1:
        if scheme in schedule_names() and mesh.ring == 1:
            raise ValueError(f'scheme="{scheme}" moves keys on the ring axis and needs ring > 1; {degrees}')
        if scheme == "ulysses" and mesh.ring > 1:
            raise ValueError(f'scheme="ulysses" needs ring = 1; {degrees}: use "hybrid"')
        if scheme == "hybrid" and 1 in (mesh.ring, mesh.ulysses):
            raise ValueError(f'scheme="hybrid" needs ring > 1 and ulysses > 1; {degrees}')
