"""What a fit makes of times that a kernel rate predicts, and of noise."""

import pytest

from ringattn.kernels.spec import Block, Call
from ringattn.parallel.geometry.block_table import BlockTable
from ringattn.parallel.machine.fit import Sample, fit_link, fit_rate, worst_error
from ringattn.parallel.machine.kernel_rate import KernelRate
from ringattn.parallel.machine.machine import Link


def equal_documents(count: int, length: int) -> BlockTable:
    spans = [(i * length, (i + 1) * length) for i in range(count)]
    return BlockTable.of([Call(tuple(Block(span, span) for span in spans), -1, 0)])


@pytest.mark.parametrize("backward", [False, True])
def test_a_fit_recovers_the_kernel(backward: bool) -> None:
    true = KernelRate(128, backward, 6e14, 64, 64, 132, 2e-6, tail=0.3, launch_seconds=2e-5, document_seconds=1e-6)
    grid = [(1, 32768), (1, 8192), (4, 8192), (16, 2048), (64, 512), (256, 128), (1, 2048), (1, 512)]
    samples = []
    for count, length in grid:
        table = equal_documents(count, length)
        samples.append(Sample(table, 8, 256, float(true.seconds(table, 8, 256)[0])))
    fitted = fit_rate(KernelRate(128, backward, 1e12, units=132), samples)
    assert worst_error(fitted, samples) < 1e-6
    assert fitted.flops == pytest.approx(true.flops)
    assert fitted.launch_seconds == pytest.approx(true.launch_seconds)
    with pytest.raises(ValueError, match="at least 4 samples, got 3"):
        fit_rate(true, samples[:3])


def test_a_fit_of_noise_has_no_negative_costs() -> None:
    samples = [Sample(equal_documents(1, length), 4, 128, 1e-3) for length in (64, 128, 256, 512)]
    fitted = fit_rate(KernelRate(64, False, 1e12, units=1), samples)
    assert min(fitted.launch_seconds, fitted.tile_seconds, fitted.document_seconds) >= 0
    assert fitted.flops > 0


def test_a_link_is_latency_and_bandwidth() -> None:
    link = fit_link([(size, 2e-4 + size / 3e11) for size in (1e5, 1e7, 1e9)], 1e-12)
    assert link.latency == pytest.approx(2e-4)
    assert link.bandwidth == pytest.approx(3e11)
    assert link.disturbance == 1e-12
    assert fit_link([(10.0, 1.0), (20.0, 1.0)]) == Link(pytest.approx(1.0), 20.0)
    with pytest.raises(ValueError, match="at least 2 sizes"):
        fit_link([(10.0, 1.0), (10.0, 2.0)])
