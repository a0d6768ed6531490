"""Names of contestants, and the contestants that they name."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch.distributed as dist

from ringattn.benchmarking.captured import SUFFIX, Captured
from ringattn.benchmarking.contestants import Contestant, Ours
from ringattn.benchmarking.flex_peer import FlexPeer
from ringattn.benchmarking.peers import RingFlashAttnLlama3, RingFlashAttnZigzag, TorchContextParallel, Usp
from ringattn.benchmarking.plain_ulysses import PlainUlysses
from ringattn.parallel.mesh.mesh import SequenceMesh, init_mesh
from ringattn.parallel.mesh.shape import MeshShape
from ringattn.parallel.planning.options import check_scheme
from ringattn.parallel.schedules.candidates import schedule_names
from ringattn.settings import AttentionOptions


@dataclass(frozen=True)
class Meshes:
    """All ways to part the ranks."""

    free: SequenceMesh
    parted: Mapping[tuple[int, int], SequenceMesh]  # by ring and ulysses degree

    @classmethod
    def opened(cls, transport: str, captured: bool = False) -> "Meshes":
        """Collective."""
        free = init_mesh(data=1, sequence=dist.get_world_size(), transport=transport, captured=captured)
        parted = {(mesh.ring, mesh.ulysses): mesh for mesh in free.alternatives if isinstance(mesh, SequenceMesh)}
        return cls(free, parted)


Maker = Callable[[Meshes], Contestant]


def contestants(
    names: Sequence[str] | None, peers: bool, transport: str = "auto", graphs: bool = False
) -> list[Contestant]:
    """By name, or with None every scheme on every mesh of all ranks; `peers` adds every other system. Collective.

    Arguments:
        transport: what moves our data, as in `init_mesh`.
        graphs: add each of them captured.

    Raises ValueError for a name that is none, or degrees that do not make up the world.
    """
    ranks = dist.get_world_size()
    asked = list(dict.fromkeys([*(names or every_name(ranks)), *(peer_names(ranks) if peers else [])]))
    if graphs:
        asked = list(dict.fromkeys(one for name in asked for one in (name, name.removesuffix(SUFFIX) + SUFFIX)))
    makers = [parse(name, ranks) for name in asked]
    shared, opened = Meshes.opened(transport), partial(Meshes.opened, transport, captured=True)
    return [_contestant(name, make, shared, opened) for name, make in zip(asked, makers, strict=True)]


def _contestant(name: str, make: Maker, shared: Meshes, opened: Callable[[], Meshes]) -> Contestant:
    found = make(shared)
    if not name.endswith(SUFFIX):
        return found
    # Peers keep nothing in transports of ours.
    return Captured(lambda: found if found.peer else make(opened()))


def every_name(ranks: int) -> list[str]:
    """Names of all schemes on all meshes of `ranks` ranks."""
    inner = [u for u in range(2, ranks) if ranks % u == 0]
    if ranks == 1:
        return ["auto:1"]
    ring = [f"{scheme}:{ranks}x1" for scheme in ("auto", *schedule_names())]
    return [f"auto:{ranks}", *ring, *(f"hybrid:{ranks // u}x{u}" for u in inner), f"ulysses:1x{ranks}"]


def peer_names(ranks: int) -> list[str]:
    """Names of other systems, in every degree that they have."""
    usp = [f"usp:{ranks // u}x{u}" for u in range(1, ranks + 1) if ranks % u == 0]
    fixed = ["plain-ulysses", "flex", "rfa-zigzag", "rfa-llama3", "rfa-llama3:1"]
    return [*fixed, *usp, "torch-cp", "torch-cp:alltoall"]


def parse(name: str, ranks: int) -> Maker:
    """What makes the contestant of a name, which is one of

    - `auto:<ranks>` for degrees that every layout chooses, or `<scheme>:<ring>x<ulysses>`; with `+narrow` the
      gradients of keys travel in the dtype of the keys (`wide_reduce=False`), with `+2groups` heads are exchanged in
      two groups;
    - `plain-ulysses`, `flex`, `rfa-zigzag`, `rfa-llama3[:<key heads at a time>]`, `usp:<ring>x<ulysses>`,
      `torch-cp[:alltoall]`;
    - any of these with `+graph` last, for replays of its captured steps: what is made here is not captured yet.

    Needs no process group. Raises ValueError.
    """
    plain = name.removesuffix(SUFFIX)
    return _peer(plain, ranks) or _ours(plain, ranks)


def _peer(name: str, ranks: int) -> Maker | None:
    fixed: dict[str, Maker] = {
        "plain-ulysses": lambda meshes: PlainUlysses(meshes.free.sequence_group),
        "flex": lambda meshes: FlexPeer(meshes.free.sequence_group),
        "rfa-zigzag": lambda _: RingFlashAttnZigzag(),
        "rfa-llama3": lambda _: RingFlashAttnLlama3(),
        "torch-cp": lambda meshes: TorchContextParallel(meshes.free.sequence_mesh),
        "torch-cp:alltoall": lambda meshes: TorchContextParallel(meshes.free.sequence_mesh, "alltoall"),
    }
    if name in fixed:
        return fixed[name]
    if stride := re.fullmatch(r"rfa-llama3:([1-9]\d*)", name):
        return lambda _: RingFlashAttnLlama3(int(stride[1]))
    if parts := re.fullmatch(r"usp:(\d+)x(\d+)", name):
        degrees = _degrees(name, parts[1], parts[2], ranks)
        return lambda _: Usp(*degrees)
    return None


def _ours(name: str, ranks: int) -> Maker:
    plain, *variants = name.split("+")
    options = _options(name, variants)
    if plain == f"auto:{ranks}":
        return lambda meshes: Ours(name, meshes.free, options)
    parts = re.fullmatch(r"(\w+):(\d+)x(\d+)", plain)
    if parts is None:
        raise ValueError(
            f"a contestant is auto:{ranks}, or <scheme>:<ring>x<ulysses> as in gather:{ranks}x1, also with +narrow, "
            f"+2groups or +8chunks, or one of {', '.join(peer_names(ranks))}; each also with {SUFFIX} last; "
            f"got {name!r}"
        )
    degrees = _degrees(name, parts[2], parts[3], ranks)
    options = options._replace(scheme=parts[1])
    check_scheme(options, MeshShape(1, *degrees))
    return lambda meshes: Ours(name, meshes.parted[degrees], options)


def _options(name: str, variants: Sequence[str]) -> AttentionOptions:
    """What the variants of a name ask for."""
    options = AttentionOptions()
    for variant in variants:
        if variant == "narrow":
            options = options._replace(wide_reduce=False)
        elif groups := re.fullmatch(r"([1-9]\d*)groups", variant):
            options = options._replace(head_groups=int(groups[1]))
        elif chunks := re.fullmatch(r"([1-9]\d*)chunks", variant):
            options = options._replace(head_chunks=int(chunks[1]))
        else:
            known = "+narrow, +<n>groups or +<n>chunks"
            raise ValueError(f"a variant is {known}, and {SUFFIX} comes last, got +{variant} in {name!r}")
    return options


def _degrees(name: str, ring: str, ulysses: str, ranks: int) -> tuple[int, int]:
    if int(ring) * int(ulysses) != ranks:
        raise ValueError(f"the degrees of {name!r} must make up the {ranks} ranks, got {ring} × {ulysses}")
    return int(ring), int(ulysses)
