"""Which machine plans are made for: a calibration of this one, else shipped numbers for a machine of its kind."""

import os
import re
import warnings
from pathlib import Path

import torch

from ringattn.environment import MACHINE
from ringattn.kernels.tuning.store import default_folder
from ringattn.kernels.tuning.tuner import device_name
from ringattn.parallel.machine.kernel_rate import KernelRate
from ringattn.parallel.machine.machine import Link, Machine

SCHEMA = 1  # of calibration files; another schema is another file


def _hopper(name: str, memory_bandwidth: float, hardware: str, note: str) -> Machine:
    # Kernels: least squares over ten calls of FlashAttention 3 and 4 on an H200 (causal documents of 8K to 256K tokens
    # and packs, 4 and 32 query heads): within 4 % forward and 6 % backward, but 40 % too fast for a pack of 64K tokens
    # in short documents on 4 heads. Head dim 64: scaled to the two rates known. Links of a node: fits to NCCL
    # point-to-point, all-to-all and copy-engine reads of 16 to 256 MiB on 8 H200s; the network is 400 Gb/s at 90 %.
    network = Link(160e-6, 45e9, 4.3e-12)
    return Machine(
        name=name,
        gpus_per_node=8,
        links={
            ("node", "p2p"): Link(150e-6, 360e9, 4.3e-12),
            ("node", "all_to_all"): Link(137e-6, 331e9, 4.3e-12),
            ("node", "copy"): Link(29e-6, 378e9, 2.0e-12),
            ("network", "p2p"): network,
            ("network", "all_to_all"): network,
            ("network", "copy"): network,
        },
        rates=(
            KernelRate(64, False, 515e12, 128, 128, 132, 0.0, 0.3, 30e-6),
            KernelRate(64, True, 550e12, 128, 128, 132, 6e-6, 0.5, 60e-6),
            KernelRate(128, False, 670e12, 128, 128, 132, 0.0, 0.3, 30e-6),
            KernelRate(128, True, 610e12, 128, 128, 132, 6e-6, 0.5, 60e-6),
        ),
        copy_bandwidth=0.75 * memory_bandwidth,
        merge_bandwidth=0.6 * memory_bandwidth,
        copy_seconds=6e-6,
        # The host: passes of hist16k on 2 GPUs, which nothing else bounds (1 ms of kernels), on virtual machines.
        host_pass=200e-6,
        host_call=220e-6,
        host_message=4e-6,
        provenance={"origin": "shipped", "hardware": hardware, "date": "2026-11-20", "note": note},
    )


_H200 = _hopper(
    "H200",
    4.8e12,
    "8 NVIDIA H200 (NVSwitch) a node, 400 Gb/s InfiniBand per GPU",
    "kernels and links of a node fitted to measurements of torch 2.11, NCCL, FlashAttention 3 and 4; network and "
    "copies from data sheets, not measured",
)
_H100 = _hopper(
    "H100",
    3.35e12,
    "8 NVIDIA H100 SXM (NVSwitch) a node, 400 Gb/s InfiniBand per GPU",
    "kernels and links as measured on H200, which has the same cores and NVLink; not measured on H100",
)
_A100 = Machine(
    name="A100",
    gpus_per_node=8,
    links={
        **{("node", primitive): Link(150e-6, 235e9) for primitive in ("p2p", "all_to_all", "copy")},
        **{("network", primitive): Link(160e-6, 22e9) for primitive in ("p2p", "all_to_all", "copy")},
    },
    rates=(
        KernelRate(64, False, 195e12, 128, 64, 108, 0.0, 0.3, 30e-6),
        KernelRate(64, True, 170e12, 64, 128, 108, 6e-6, 0.5, 60e-6),
        KernelRate(128, False, 220e12, 128, 64, 108, 0.0, 0.3, 30e-6),
        KernelRate(128, True, 190e12, 64, 128, 108, 6e-6, 0.5, 60e-6),
    ),
    copy_bandwidth=1.5e12,
    merge_bandwidth=1.2e12,
    copy_seconds=6e-6,
    provenance={
        "origin": "shipped",
        "hardware": "8 NVIDIA A100 SXM (NVSwitch) a node, 200 Gb/s InfiniBand per GPU",
        "date": "2026-11-20",
        "note": "not measured: kernels after the rates published for FlashAttention 2 (arXiv 2307.08691), links and "
        "copies from data sheets, fixed costs as on H200",
    },
)
_CPU = Machine(
    name="CPU",
    gpus_per_node=1,
    links={
        (link_class, primitive): Link(250e-6, 4e9)
        for link_class in ("node", "network")
        for primitive in ("p2p", "all_to_all", "copy")
    },
    rates=(
        KernelRate(64, False, 45e9, 16, 16, 1, document_seconds=20e-6),
        KernelRate(64, True, 42e9, 16, 16, 1, document_seconds=30e-6),
    ),
    copy_bandwidth=100e9,
    merge_bandwidth=35e9,
    copy_seconds=10e-6,
    provenance={
        "origin": "shipped",
        "hardware": "2 processes of one thread each, gloo over the loopback",
        "date": "2026-11-20",
        "note": "one calibration of torch 2.13 on a shared machine, float32, rounded; CPUs differ: calibrate",
    },
)

SHIPPED = {machine.name: machine for machine in (_H200, _H100, _A100, _CPU)}


def shipped_as(name: str) -> Machine | None:
    """The shipped machine of a name, in capitals or not; None if there is none."""
    return SHIPPED.get(name.upper())


def shipped(device: str) -> Machine:
    """The shipped numbers for a device, by its name (`NVIDIA H100 80GB HBM3`) or type (`cuda`, `cpu`)."""
    if device == "cpu":
        return SHIPPED["CPU"]
    kinds = {"H100": "H100", "H800": "H100", "A100": "A100", "A800": "A100"}
    return SHIPPED[next((name for part, name in kinds.items() if part in device), "H200")]


def calibration_path(device_type: str, folder: Path | None = None) -> Path:
    """Where the calibration of this process' device is kept: in RINGATTN_CACHE_DIR, by the name of the device."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device_type).lower()).strip("-")
    return (default_folder() if folder is None else folder) / f"machine-{SCHEMA}-{name}.json"


def local_machine(device_type: str) -> Machine:
    """What this process would plan for: RINGATTN_MACHINE, else its calibration, else the shipped numbers.

    Files of other hosts may differ: `init_mesh` makes all ranks agree. Raises ValueError for a RINGATTN_MACHINE that is
    neither shipped nor a calibration file; a broken file in the cache is a warning.
    """
    chosen = MACHINE.read()
    if chosen is not None:
        return named_machine(MACHINE.name, chosen)
    path = calibration_path(device_type)
    try:
        return Machine.from_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        warnings.warn(f"ignoring {path}, which cannot be read: {error}", stacklevel=2)
    has_name = device_type == "cuda" and torch.cuda.is_available()
    return shipped(torch.cuda.get_device_name() if has_name else device_type)


def named_machine(source: str, chosen: str) -> Machine:
    """A shipped machine or that of a calibration file. Raises ValueError that names the `source` of what is neither."""
    if (found := shipped_as(chosen)) is not None:
        return found
    if not os.path.isfile(chosen):
        raise ValueError(f"{source} must be {', '.join(SHIPPED)} or the path of a calibration file, got {chosen!r}")
    try:
        return Machine.from_json(Path(chosen).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}={chosen} cannot be read: {error}") from error


def keep(machine: Machine, device_type: str, folder: Path | None = None) -> Path:
    """Store a calibration where `local_machine` finds it. Raises OSError if the folder cannot be written."""
    return write(machine, calibration_path(device_type, folder))


def write(machine: Machine, path: Path) -> Path:
    """Store a machine as JSON, for RINGATTN_MACHINE. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(f".{os.getpid()}.new")
    new.write_text(machine.to_json() + "\n", encoding="utf-8")
    new.replace(path)  # a reader sees the old file or the new one
    return path
