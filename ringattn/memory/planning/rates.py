"""Speeds of a machine beside those of attention: matrix products, memory, the way to the host and the host itself."""

from dataclasses import dataclass

from ringattn.parallel.machine.machine import Machine
from ringattn.parallel.machine.peak_flops import peak_flops

GEMM = 0.70  # of the peak: 690 TFLOP/s of a bf16 product of 8192 rows and columns on an H200
CPU_FLOPS = 1e11  # by order of magnitude


@dataclass(frozen=True)
class Rates:
    """Arguments:
    peak: FLOP/s by data sheet, of which MFU is a share.
    gemm: share of it that large products reach.
    memory: bytes a second that element by element work reads and writes.
    host_link: bytes a second between a device and its host, each way.
    host_memory: bytes a second that the optimizer reads and writes on a host, all its ranks together.
    """

    peak: float
    gemm: float
    memory: float
    host_link: float
    host_memory: float

    @classmethod
    def of(cls, machine: Machine) -> "Rates":
        """Of a machine, by its name; host and link by data sheet: PCIe of the fifth generation (of the fourth for an
        A100) at 85 %, and two sockets at what an AdamW reaches on them."""
        peak = peak_flops(machine.name)
        if peak is None:
            return cls(CPU_FLOPS, 1.0, machine.copy_bandwidth, machine.copy_bandwidth, machine.copy_bandwidth)
        link = 25e9 if "A100" in machine.name else 53e9
        return cls(peak, GEMM, machine.copy_bandwidth, link, 200e9)

    def products(self, flops: float) -> float:
        """Seconds of matrix products."""
        return flops / (self.peak * self.gemm)
