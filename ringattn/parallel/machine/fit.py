"""From measured times to the numbers of the cost model: least squares in relative errors, nothing negative. Pure."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ringattn.parallel.geometry.block_table import BlockTable, Floats
from ringattn.parallel.machine.kernel_rate import KernelRate
from ringattn.parallel.machine.machine import Link

TAILS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
TILES = (128, 64, 32, 16)  # rows, of both sides


@dataclass(frozen=True)
class Sample:
    """One measured call: its blocks, query heads, head dim and value dim together, seconds."""

    blocks: BlockTable
    heads: int
    dims: int
    seconds: float

    def predicted(self, rate: KernelRate) -> float:
        return float(rate.seconds(self.blocks, self.heads, self.dims).sum())


def fit_rate(start: KernelRate, samples: Sequence[Sample]) -> KernelRate:
    """The speed, tiles, fixed costs and tail of a kernel; `start` gives head dim, direction and units.

    Raises ValueError for fewer than four samples.
    """
    if len(samples) < 4:
        raise ValueError(f"a kernel's rate needs at least 4 samples, got {len(samples)}")
    fitted = (_fit_with(start, samples, tail, tile) for tile in TILES for tail in TAILS)
    return min(fitted, key=lambda rate: _error(rate, samples))


def worst_error(rate: KernelRate, samples: Sequence[Sample]) -> float:
    """The largest relative error of predicted times."""
    return max(abs(sample.predicted(rate) / sample.seconds - 1) for sample in samples)


def fit_link(samples: Sequence[tuple[float, float]], disturbance: float = 0.0) -> Link:
    """Latency and bandwidth from (bytes, seconds) of at least two sizes."""
    if len({size for size, _ in samples}) < 2:
        raise ValueError(f"a link needs at least 2 sizes, got {[size for size, _ in samples]}")
    seconds = np.array([time for _, time in samples])
    matrix = np.array([[1.0, size] for size, _ in samples])
    latency, per_byte = _least_squares(matrix, seconds)
    # All latency: then the largest transfer is a lower bound of the bandwidth.
    largest = max(samples)
    return Link(float(latency), float(1 / per_byte if per_byte > 0 else largest[0] / largest[1]), disturbance)


def _error(rate: KernelRate, samples: Sequence[Sample]) -> float:
    return sum(np.log(sample.predicted(rate) / sample.seconds) ** 2 for sample in samples)


def _fit_with(start: KernelRate, samples: Sequence[Sample], tail: float, tile: int) -> KernelRate:
    """Time is linear in the fixed costs and the cost of a step: the columns are predictions with one of them 1."""
    rate = KernelRate(start.head_dim, start.backward, np.inf, tile, tile, start.units, tail=tail)
    columns = [
        replace(rate, launch_seconds=1.0),
        replace(rate, document_seconds=1.0),
        replace(rate, tile_seconds=1.0),
        replace(rate, flops=start.flops),
    ]
    matrix = np.array([[sample.predicted(column) for column in columns] for sample in samples])
    launch, document, each, step = _least_squares(matrix, np.array([sample.seconds for sample in samples]))
    return replace(
        rate,
        flops=float(start.flops / (step or 1e-6)),  # a device without a cost per step would be infinitely fast
        tile_seconds=float(each),
        launch_seconds=float(launch),
        document_seconds=float(document),
    )


def _least_squares(matrix: Floats, seconds: Floats) -> Floats:
    """The x >= 0 with the least relative error of `matrix @ x`: the best over all sets of x that are not 0."""
    weighted, ones = matrix / seconds[:, None], np.ones(len(seconds))
    best, best_error = np.zeros(matrix.shape[1]), np.inf
    for size in range(1, matrix.shape[1] + 1):
        for some in itertools.combinations(range(matrix.shape[1]), size):
            x = np.zeros(matrix.shape[1])
            x[list(some)] = np.linalg.lstsq(weighted[:, some], ones, rcond=None)[0]
            error = float(((weighted @ x - ones) ** 2).sum())
            if (x >= 0).all() and error < best_error:
                best, best_error = x, error
    return best
