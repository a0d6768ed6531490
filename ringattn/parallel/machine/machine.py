"""A machine in numbers: its links, kernels and copies, and what one call, transfer or copy takes. Pure."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from ringattn.kernels.spec import Call
from ringattn.parallel.geometry.block_table import BlockTable, Floats
from ringattn.parallel.machine.kernel_rate import KernelRate
from ringattn.parallel.plan.shape import Shape

CLASSES = ("node", "network")
PRIMITIVES = ("p2p", "all_to_all", "copy")
MOVED_BY = {"ring": "p2p", "ulysses": "all_to_all"}  # the primitive that moves the data of a mesh axis


@dataclass(frozen=True)
class Link:
    """One primitive over one class of link.

    Arguments:
        latency: seconds before the first byte.
        bandwidth: bytes per second, one direction, per device.
        disturbance: seconds that kernels lose per byte that travels beside them.
    """

    latency: float
    bandwidth: float
    disturbance: float = 0.0


@dataclass(frozen=True)
class Machine:
    """What calibration measures. JSON round trip: `Machine.from_json(machine.to_json())` is equal.

    Arguments:
        gpus_per_node: devices joined by "node" links; all others are reached over the "network", rail-aligned: every
            device has its own port, and devices of the same place in their nodes share a switch.
        links: (class, primitive) -> Link; classes "node" and "network", primitives "p2p", "all_to_all" and "copy" (a
            copy engine reads a peer's memory).
        rates: kernels by head dim and direction.
        copy_bandwidth: bytes read and written per second by copies on the device.
        merge_bandwidth: bytes read and written per second when partial results are merged or added.
        copy_seconds: fixed cost of a small operation between kernels: a copy, a merge.
        host_pass, host_call, host_message: seconds that the host takes to issue a pass or one of its transfers, a
            kernel call, and a message; `host_seconds` adds them up. 0: never the bottleneck.
        engines: the mesh axes, "ring" or "ulysses", whose ranks read each other's memory by copy engines; none as it
            was calibrated. It decides which message buffers there are.
        provenance: where the numbers come from: "origin" ("shipped" or "measured"), "hardware", "versions", "date" and
            what else there is to know.
    """

    name: str
    gpus_per_node: int
    links: Mapping[tuple[str, str], Link]
    rates: tuple[KernelRate, ...]
    copy_bandwidth: float
    merge_bandwidth: float
    copy_seconds: float
    provenance: Mapping[str, Any] = field(default_factory=dict)
    host_pass: float = 0.0
    host_call: float = 0.0
    host_message: float = 0.0
    engines: tuple[str, ...] = ()

    @cached_property
    def digest(self) -> str:
        """Machines with the same digest lead to the same plans."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def rate(self, head_dim: int, backward: bool) -> KernelRate:
        """The kernel of the nearest head dim that is known."""
        known = [rate for rate in self.rates if rate.backward == backward]
        return min(known, key=lambda rate: (abs(rate.head_dim - head_dim), rate.head_dim))

    def link_class(self, a: int, b: int) -> str:
        """The class of link between two sequence ranks, if their group starts at the first device of a node."""
        return "node" if a // self.gpus_per_node == b // self.gpus_per_node else "network"

    def by_copy_engines(self, ring: bool = True, ulysses: bool = True) -> "Machine":
        """The same where the ranks of these axes that are in one node read each other's memory instead of calling
        collectives."""
        engines = tuple(axis for axis, copies in (("ring", ring), ("ulysses", ulysses)) if copies)
        if not engines:
            return self
        links = {**self.links, **{("node", MOVED_BY[axis]): self.links["node", "copy"] for axis in engines}}
        where = "" if ring and ulysses else f" on the {engines[0]} axis"
        return replace(self, name=f"{self.name}, copy engines{where}", links=links, engines=engines)

    def captured(self) -> "Machine":
        """The same for steps that are captured in CUDA graphs: replays need no host."""
        return replace(self, name=f"{self.name}, captured", host_pass=0.0, host_call=0.0, host_message=0.0)

    def __str__(self) -> str:
        return f"{self.name} ({self.provenance.get('origin', 'of unknown origin')})"

    def to_json(self) -> str:
        fields = {
            **{name: getattr(self, name) for name in ("name", "gpus_per_node", "copy_bandwidth", "merge_bandwidth")},
            **{name: getattr(self, name) for name in ("copy_seconds", "host_pass", "host_call", "host_message")},
            "links": {"/".join(key): asdict(link) for key, link in sorted(self.links.items())},
            "rates": [rate.as_json() for rate in self.rates],
            "provenance": dict(self.provenance),
            "engines": list(self.engines),
        }
        return json.dumps(fields, indent=1, sort_keys=True)

    def _check(self) -> None:
        """Raises ValueError if a number that plans divide by, or a link or kernel that they ask for, is missing."""
        if not isinstance(self.gpus_per_node, int) or self.gpus_per_node < 1:
            raise ValueError(f"gpus_per_node must be an integer >= 1, got {self.gpus_per_node!r}")
        if missing := sorted({(a, b) for a in CLASSES for b in PRIMITIVES} - set(self.links)):
            raise ValueError(f"links must have {', '.join(map('/'.join, missing))}")
        if {rate.backward for rate in self.rates} != {False, True}:
            raise ValueError("rates must have kernels of both directions, forward and backward")
        speeds = {f"links {'/'.join(key)}": link.bandwidth for key, link in self.links.items()}
        speeds |= {"copy_bandwidth": self.copy_bandwidth, "merge_bandwidth": self.merge_bandwidth}
        speeds |= {f"rates[{number}].flops": rate.flops for number, rate in enumerate(self.rates)}
        for name, speed in speeds.items():
            if not 0 < speed < math.inf:
                raise ValueError(f"{name} must be a number > 0, got {speed}")

    @classmethod
    def from_json(cls, text: str) -> "Machine":
        """Raises ValueError for text that is no machine."""
        try:
            fields = json.loads(text)
            links = {tuple(key.split("/")): Link(**link) for key, link in fields.pop("links").items()}
            rates = tuple(KernelRate(**rate) for rate in fields.pop("rates"))
            engines = tuple(fields.pop("engines", ()))  # files of calibrations may be without it
            machine = cls(links=links, rates=rates, engines=engines, **fields)
            machine._check()
            return machine
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"not the JSON of a machine: {type(error).__name__}: {error}") from error


def call_seconds(machine: Machine, call: Call, shape: Shape, backward: bool) -> float:
    """One kernel launch; `shape` is of the rank that computes it (`Shape.share`)."""
    return float(calls_seconds(machine, BlockTable.of([call]), shape, backward)[0])


def calls_seconds(machine: Machine, blocks: BlockTable, shape: Shape, backward: bool) -> Floats:
    """Seconds of each call of a table."""
    rate = machine.rate(max(shape.head_dim, shape.value_dim), backward)
    return rate.seconds(blocks, shape.query_heads, shape.head_dim + shape.value_dim)


# The sizes below may be numbers or arrays, and nothing costs nothing: hence the factors `size > 0`.


def transfer_seconds(machine: Machine, size: Any, link_class: str, primitive: str) -> Any:
    """One transfer of `size` bytes per device."""
    link = machine.links[link_class, primitive]
    return (size > 0) * (link.latency + size / link.bandwidth)


def copy_seconds(machine: Machine, size: Any, operations: Any = 1) -> Any:
    """Copying `size` bytes on the device, in so many operations: each byte is read and written."""
    return (size > 0) * (operations * machine.copy_seconds + 2 * size / machine.copy_bandwidth)


def merge_seconds(machine: Machine, size: Any, operations: Any = 1) -> Any:
    """Merging or adding partial results: `size` bytes are read and written in all."""
    return (size > 0) * (operations * machine.copy_seconds + size / machine.merge_bandwidth)
