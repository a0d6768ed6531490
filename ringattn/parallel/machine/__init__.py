"""Speeds of a machine: kernel rates, links, shipped numbers, calibration."""

from ringattn.parallel.machine.kernel_rate import KernelRate
from ringattn.parallel.machine.machine import Link, Machine
from ringattn.parallel.machine.shipped import SHIPPED, local_machine

__all__ = ["SHIPPED", "KernelRate", "Link", "Machine", "local_machine"]
