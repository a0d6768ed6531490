"""Machines that are shipped: numbers to plan with where nothing was measured."""

from ringattn.parallel.cost import Link, Machine
from ringattn.parallel.rates import KernelRate

_H200 = Machine(
    name="H200",
    gpus_per_node=8,
    links={
        ("node", "p2p"): Link(150e-6, 360e9, 4.3e-12),
        ("node", "all_to_all"): Link(137e-6, 331e9, 4.3e-12),
        ("node", "copy"): Link(29e-6, 378e9, 2.0e-12),
        ("network", "p2p"): Link(160e-6, 45e9, 4.3e-12),
        ("network", "all_to_all"): Link(160e-6, 45e9, 4.3e-12),
        ("network", "copy"): Link(160e-6, 45e9, 4.3e-12),
    },
    rates=(
        KernelRate(128, False, 670e12, 128, 128, 132, 0.0, 0.3, 30e-6),
        KernelRate(128, True, 610e12, 128, 128, 132, 6.0e-6, 0.5, 60e-6),
        KernelRate(64, False, 525e12, 128, 128, 132, 1.5e-6, 0.15, 15e-6),
        KernelRate(64, True, 550e12, 128, 128, 132, 3.0e-6, 0.15, 40e-6),
    ),
    copy_bandwidth=3.6e12,
    merge_bandwidth=3.0e12,
    copy_seconds=6e-6,
    provenance={"origin": "shipped", "hardware": "8 H200, NVSwitch, 400 Gb/s InfiniBand per GPU (not measured)"},
)

SHIPPED = {machine.name: machine for machine in (_H200,)}


def shipped(device: str) -> Machine:
    """The shipped numbers for a device, by its name (`torch.cuda.get_device_name`) or type."""
    return SHIPPED["H200"]
