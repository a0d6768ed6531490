"""The process mesh: data × ring × ulysses, ulysses innermost so that its exchange stays inside a node."""

import os
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ringattn.parallel.machine.machine import Machine
from ringattn.parallel.machine.shipped import local_machine
from ringattn.parallel.mesh.connections import Connections
from ringattn.parallel.mesh.shape import MeshShape, resolve_mesh
from ringattn.parallel.transport.peer_access import why_not
from ringattn.parallel.transport.process_groups import Lease, check_alike
from ringattn.parallel.transport.protocol import Transport

TRANSPORTS = ("auto", "collective", "copy")


@dataclass(frozen=True)
class SequenceMesh(MeshShape):
    """The mesh of a running job.

    `device_mesh` has the dimensions ("data", "ring", "ulysses"). The groups hold this rank's peers on one axis (or on
    both sequence axes, ordered by `sequence_rank`); an axis of size 1 has a group of one. Equal meshes have the same
    groups, which are open until all those meshes are closed (`with init_mesh(...) as mesh:` does it) or the default
    process group is destroyed.
    """

    data_rank: int = 0
    device_type: str = "cpu"
    # What `close` ends.
    connections: Connections = field(kw_only=True, repr=False, compare=False)
    # Why the ranks of an axis do not read each other's memory by copy engines; "" where they do.
    ring_reason: str = field(default="not asked for", kw_only=True, repr=False, compare=False)
    ulysses_reason: str = field(default="not asked for", kw_only=True, repr=False, compare=False)

    @property
    def closed(self) -> bool:
        return self.connections.closed

    def close(self) -> None:
        """Give the process groups back: those that no other open mesh uses are destroyed. Collective.

        This mesh and its alternatives cannot be used any more: attentions, models and layouts on them raise a
        ValueError, also the backward passes of what they computed before. Without effect the second time.
        """
        self.connections.close()

    def __enter__(self) -> "SequenceMesh":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __deepcopy__(self, memo: object) -> "SequenceMesh":
        return self  # process groups cannot be copied, and a copied model attends over the same ranks

    @property
    def shape(self) -> MeshShape:
        """Its numbers without the processes: what plans are made from, wherever that is done."""
        others = tuple(other.shape for other in self.alternatives if isinstance(other, SequenceMesh))
        return MeshShape(
            self.data, self.ring, self.ulysses, self.sequence_rank, machine=self.machine, alternatives=others
        )

    @property
    def device(self) -> torch.device:
        return _device(self.device_type)

    @property
    def device_mesh(self) -> DeviceMesh:
        return self.connections.mesh("device")

    @property
    def sequence_mesh(self) -> DeviceMesh:
        """The ranks of both sequence axes, in one dimension, "sequence"."""
        return self.connections.mesh("sequence")

    @property
    def ring_group(self) -> dist.ProcessGroup:
        return self.connections.group("ring")

    @property
    def ulysses_group(self) -> dist.ProcessGroup:
        return self.connections.group("ulysses")

    @property
    def sequence_group(self) -> dist.ProcessGroup:
        return self.connections.group("sequence")

    @property
    def ring_transport(self) -> Transport:
        """What moves keys."""
        return self.connections.transport("ring", self.ring_reason)

    @property
    def ulysses_transport(self) -> Transport:
        """What moves heads."""
        return self.connections.transport("ulysses", self.ulysses_reason)


def init_mesh(
    data: int | None = None,
    ring: int | None = None,
    ulysses: int | None = None,
    device_type: str | None = None,
    ulysses_across_nodes: bool = False,
    sequence: int | None = None,
    transport: str = "auto",
    captured: bool = False,
) -> SequenceMesh:
    """Build the mesh of this job; collective over all ranks, and initialises the default process group if needed.

    Meshes of equal degrees and device type share their process groups: making another one opens nothing.

    Arguments:
        data, ring, ulysses: degrees; omitted ones are inferred as in `resolve_mesh`.
        device_type: "cuda" or "cpu"; default: cuda where there is one.
        ulysses_across_nodes: allow an ulysses group to span nodes (LOCAL_WORLD_SIZE ranks each).
        sequence: sequence ranks, instead of ring and ulysses: every layout then chooses its own degrees, by predicted
            time. The mesh itself is all ring; `alternatives` are those that a layout may take.
        transport: "collective" moves everything by NCCL's or gloo's all-to-all; "copy" lets copy engines read the
            memory of peers, on CUDA devices of one host; "auto" does that on every axis where it works. The mesh's
            `ring_reason` and `ulysses_reason` say why not.
        captured: steps will be captured in CUDA graphs, so plans need not spare the host.

    The mesh's `machine`, for which plans are made, is this machine's calibration or the shipped one
    (`ringattn.parallel.machine.shipped.local_machine`); where ranks would differ all take rank 0's.

    Raises ValueError, before any communication, when the degrees do not fit the world size, and on every rank where
    ranks have different meshes open; NotImplementedError on every rank where transport="copy" cannot be had.
    """
    if transport not in TRANSPORTS:
        raise ValueError(f"transport must be one of {', '.join(TRANSPORTS)}, got {transport!r}")
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or None
    if sequence is not None and (ring is not None or ulysses is not None):
        raise ValueError(f"sequence={sequence} leaves ring and ulysses to the layouts, got {ring} and {ulysses}")
    shape = resolve_mesh(
        world_size, data, ring if sequence is None else sequence, ulysses if sequence is None else 1, local_size,
        ulysses_across_nodes,
    )  # fmt: skip
    if not dist.is_initialized() and world_size == 1:
        _init_single_process(device_type)
    lease = Lease()
    try:
        return _leased(lease, shape, device_type, sequence is not None, local_size, transport, captured)
    except BaseException:
        lease.close()
        raise


def _leased(
    lease: Lease,
    shape: MeshShape,
    device_type: str,
    free: bool,
    local_size: int | None,
    transport: str,
    captured: bool,
) -> SequenceMesh:
    """A mesh of a shape, or one that leaves the degrees to layouts. Collective."""
    check_alike(lambda: _device(device_type))
    mesh = _mesh(lease, shape, device_type, captured=captured)
    _open_groups(mesh)
    machine = mesh.machine
    mesh = _with_transport(mesh, transport)
    if not free:
        return mesh
    degrees = mesh.parted(local_size)[1:]
    others = [_mesh(lease, MeshShape(shape.data, *pair), device_type, machine) for pair in degrees]
    for other in others:
        _open_groups(other)
    others = [_with_transport(other, transport) for other in others]
    return replace(mesh, alternatives=(mesh, *others))


def _mesh(
    lease: Lease, shape: MeshShape, device_type: str, machine: Machine | None = None, captured: bool = False
) -> SequenceMesh:
    """Collective; the first one initialises the default process group, if there is none."""
    sizes = (shape.data, shape.ring, shape.ulysses)
    device_mesh = lease.axes(device_type, sizes)
    rank = dist.get_rank()
    if machine is None:
        machine = _agreed_machine(device_type)
        machine = machine.captured() if captured else machine
    return SequenceMesh(
        *sizes,
        sequence_rank=rank % shape.sequence_size,
        machine=machine,
        data_rank=rank // shape.sequence_size,
        device_type=device_type,
        connections=Connections(device_mesh, lease.sequence(device_mesh), lease),
    )


def _device(device_type: str) -> torch.device:
    """This process' device."""
    if device_type == "cpu":
        return torch.device("cpu")
    return torch.device(device_type, torch.get_device_module(device_type).current_device())


def _init_single_process(device_type: str) -> None:
    """A world of one, for a script that was started without a launcher."""
    backend = "nccl" if device_type == "cuda" else "gloo"
    device = torch.device("cuda", torch.cuda.current_device()) if device_type == "cuda" else None
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=device)


def _agreed_machine(device_type: str) -> Machine:
    """The machine that plans are made for: rank 0's, if ranks differ, so that all plan alike. Collective."""
    mine = local_machine(device_type)
    if dist.get_world_size() == 1:
        return mine
    digest = int(mine.digest[:15], 16)
    digests = torch.tensor([digest, -digest], device=_device(device_type))
    dist.all_reduce(digests, dist.ReduceOp.MAX)
    if digests[0] == -digests[1]:
        return mine
    box = [mine.to_json()]
    dist.broadcast_object_list(box, src=0, device=digests.device)
    return Machine.from_json(box[0])


def _with_transport(mesh: SequenceMesh, transport: str) -> SequenceMesh:
    """The same with what its axes move data by. Collective."""
    if mesh.sequence_size == 1:
        return mesh
    if transport == "collective" or mesh.device_type != "cuda":
        told = "not asked for" if transport == "collective" else f"{mesh.device_type} devices have no copy engine"
        ring = ulysses = told
    else:
        # Where all ranks reach each other's memory those of an axis do.
        ring = ulysses = why_not(mesh.sequence_group)
        if ulysses and 1 < mesh.ulysses < mesh.sequence_size:
            # Plans are made for one machine: all groups do it, or none.
            ulysses = _first_of_all(why_not(mesh.ulysses_group), mesh.sequence_group)
    if transport == "copy" and (told := _first_of_all(ring or ulysses, None)):
        raise NotImplementedError(f'transport="copy" cannot be had: {told}')
    machine = mesh.machine
    if machine is not None:
        machine = machine.by_copy_engines(ring=not ring, ulysses=not ulysses)
    return replace(mesh, machine=machine, ring_reason=ring, ulysses_reason=ulysses)


def _first_of_all(reason: str, group: dist.ProcessGroup | None) -> str:
    """The first reason that a rank of the group (None: of the world) has, the same on all of them. Collective."""
    found: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(found, reason, group=group)
    return next((told for told in found if told), "")


def _open_groups(mesh: SequenceMesh) -> None:
    """One small collective per group: with NCCL, traffic between some ranks only must not be a group's first work."""
    token = torch.zeros(1, device=mesh.device)
    for group in (mesh.ring_group, mesh.ulysses_group, mesh.sequence_group):
        dist.all_reduce(token, group=group)
