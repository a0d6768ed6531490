"""Fixtures and hypothesis profiles for all tests."""

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from hypothesis import HealthCheck, settings

from tests.caches import cached_functions, clear_caches
from tests.pool import Pools, shares_devices

# Python's own distutils and the one of setuptools exclude each other: torch's compiler wants the latter, and fails
# where some library has imported the former before.
if find_spec("setuptools") is not None:
    import setuptools  # noqa: F401

# No deadline anywhere: the first call of a kernel or a worker pool takes seconds. CI must not fail by luck of the draw.
settings.register_profile("dev", deadline=None, print_blob=True)
# Fewer examples than by hand, where pytest alone draws others each time: CI has half an hour for everything.
settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    print_blob=True,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(scope="session")
def pool() -> Iterator[Pools]:
    """`pool(world_size)` or `pool(world_size, "cuda")`: worker processes, see tests/pool.py."""
    pools = Pools()
    yield pools
    pools.close()


@pytest.fixture(autouse=True)
def _no_group_is_left() -> Iterator[None]:
    """A test that leaves torch's default process group in this process fails, not whichever makes one after it."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        pytest.fail("left torch's default process group: use `pool`, or destroy the group")


@pytest.fixture
def fresh_caches() -> Iterator[None]:
    """Nothing that ringattn keeps is left from an earlier test or to a later one."""
    kept = cached_functions()  # a test may put something else in the place of one
    clear_caches()
    yield
    clear_caches()
    for function in kept:
        function.cache_clear()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `slow` or `nightly` run only where `-m` asks for them. No name holds an address: workers that run
    side by side must find the same ones."""
    if addresses := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"tests need names that are the same in every process, got {addresses[0]}")
    unasked = [name for name in ("slow", "nightly") if name not in config.option.markexpr]
    left_out = [item for item in items if any(item.get_closest_marker(name) for name in unasked)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip `@pytest.mark.gpu` and `@pytest.mark.gpu(n)` where there are fewer than n (default 1) CUDA devices, unless
    ranks share them (`tests.pool.shares_devices`)."""
    needed = max((mark.args[0] if mark.args else 1 for mark in item.iter_markers("gpu")), default=0)
    if needed:
        import torch

        present = torch.cuda.device_count()
        if present < needed and not (present and shares_devices()):
            pytest.skip(f"needs {needed} CUDA devices, found {present}")
