"""Degrees of the mesh axes, without processes: all that layouts and plans need to know."""

from dataclasses import dataclass, field

from ringattn.parallel.machine.machine import Machine
from ringattn.parallel.machine.shipped import SHIPPED
from ringattn.parallel.transport.process_groups import AXES


@dataclass(frozen=True)
class MeshShape:
    """Degrees of the three axes and one rank's place on the sequence axes: all that layouts and plans need to know."""

    data: int = 1
    ring: int = 1
    ulysses: int = 1
    sequence_rank: int = 0
    # Whose speed plans are made for: not what the mesh is, so it takes no part in comparisons.
    machine: Machine | None = field(default=None, kw_only=True, compare=False, repr=False)
    # Other ways to part the same ranks, this one among them: a layout takes the one that suits its documents.
    alternatives: "tuple[MeshShape, ...]" = field(default=(), kw_only=True, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in AXES:
            size = getattr(self, name)
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {size!r}")
        if not 0 <= self.sequence_rank < self.sequence_size:
            raise ValueError(f"sequence_rank must be in [0, {self.sequence_size}), got {self.sequence_rank}")

    @property
    def sequence_size(self) -> int:
        return self.ring * self.ulysses

    def parted(self, ranks_per_node: int | None = None) -> "list[tuple[int, int]]":
        """All (ring, ulysses) of as many sequence ranks whose ulysses groups stay inside a node."""
        size, node = self.sequence_size, ranks_per_node or self.sequence_size
        return [(size // u, u) for u in range(1, size + 1) if size % u == 0 and (size <= node or node % u == 0)]

    def planned_for(self, machine: Machine | None = None) -> Machine:
        """Whose speed plans are made for: the one that is asked for, else the mesh's, else the shipped H200."""
        return machine or self.machine or SHIPPED["H200"]

    @property
    def closed(self) -> bool:
        """Whether its process groups may be gone."""
        return False

    @property
    def ring_rank(self) -> int:
        return self.sequence_rank // self.ulysses

    @property
    def ulysses_rank(self) -> int:
        return self.sequence_rank % self.ulysses


def resolve_mesh(
    world_size: int,
    data: int | None = None,
    ring: int | None = None,
    ulysses: int | None = None,
    ranks_per_node: int | None = None,
    ulysses_across_nodes: bool = False,
) -> MeshShape:
    """Fill in the omitted degrees so that data × ring × ulysses = world_size. Pure: may run before any process group.

    One omitted degree is what the others leave. With more omitted, data and ulysses default to 1 and ring takes the
    rest. Raises ValueError with all the numbers when the product does not fit, or when an ulysses group would span
    nodes of `ranks_per_node` ranks and `ulysses_across_nodes` does not ask for it.
    """
    asked = {"data": data, "ring": ring, "ulysses": ulysses}
    for name, size in asked.items():
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"{name} must be an integer >= 1 or omitted, got {size!r}")
    missing = [name for name, size in asked.items() if size is None]
    rest_axis = "ring" if "ring" in missing else (missing[0] if missing else None)
    sizes = {name: 1 if size is None else size for name, size in asked.items()}
    product = sizes["data"] * sizes["ring"] * sizes["ulysses"]
    if rest_axis is not None and world_size % product == 0:
        sizes[rest_axis] = world_size // product
        product = world_size
    if product != world_size:
        shown = " × ".join(f"{name}={'?' if name == rest_axis else sizes[name]}" for name in AXES)
        raise ValueError(
            f"data × ring × ulysses must equal the world size {world_size}, got {shown} (product {product})"
        )
    if (
        ranks_per_node
        and not ulysses_across_nodes
        and ranks_per_node % sizes["ulysses"]
        and world_size > ranks_per_node
    ):
        raise ValueError(
            f"ulysses={sizes['ulysses']} would cross nodes of {ranks_per_node} ranks (world size {world_size}): its "
            f"exchange belongs inside a node. Use an ulysses degree that divides {ranks_per_node} and ring for the "
            "rest, or ask for it with ulysses_across_nodes=True"
        )
    return MeshShape(sizes["data"], sizes["ring"], sizes["ulysses"])
