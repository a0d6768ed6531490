"""What may be asked of a plan, checked."""

from ringattn.parallel.mesh.shape import MeshShape
from ringattn.parallel.schedules.candidates import schedule_names


def scheme_names() -> tuple[str, ...]:
    """All that `scheme=` may be: the schedules, and what says which axes there are."""
    return tuple(dict.fromkeys(("auto", "ring", "ulysses", "hybrid", *schedule_names())))


def check_scheme(scheme: str, mesh: MeshShape, stages: int | None = None, parts: int = 1) -> None:
    """Raises ValueError, with the degrees, if `scheme` cannot run on the axes of `mesh`, or in several parts."""
    if scheme not in scheme_names():
        raise ValueError(f"scheme must be one of {', '.join(scheme_names())}, got {scheme!r}")
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
    if stages is not None:
        if not isinstance(stages, int) or stages < 2:
            raise ValueError(f"stages must be an integer >= 2 (the local one and at least one cast), got {stages!r}")
        if scheme != "ring":
            raise ValueError(f'stages belongs to scheme="ring", got stages={stages} with scheme="{scheme}"')


def check_heads(head_groups: int | None, head_chunks: int | None) -> None:
    """Raises ValueError for wrong numbers."""
    for name, value in (("head_groups", head_groups), ("head_chunks", head_chunks)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be None or an integer >= 1, got {value!r}")
    if min(head_groups or 1, head_chunks or 1) > 1:
        raise ValueError(f"head_groups and head_chunks must not both be above 1, got {head_groups} and {head_chunks}")
