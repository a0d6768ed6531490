"""The worker pool itself: results, exceptions, hangs and deaths."""

import os
import signal
import sys
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from tests.pool import Pool, Pools, RemoteTraceback, WorkerError


class Awkward(Exception):
    """Can be pickled and not read again."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def total(value: int) -> tuple[int, int, int]:
    summed = torch.tensor(value + dist.get_rank())
    dist.all_reduce(summed)
    return dist.get_rank(), int(summed), torch.get_num_threads()


def tensors(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    view = torch.arange(1_000_000)[10:13]
    return {**given, "view": view, "half": torch.tensor([1.5], dtype=torch.bfloat16), "turned": torch.ones(2, 3).t()}


def refuse(word: str) -> None:
    raise ValueError(f"no {word} on rank {dist.get_rank()}")


def refuse_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError("alone")
    dist.barrier()


def refuse_case(case: int) -> int:
    if case == 2:
        raise ValueError("two")
    return case


def raise_awkward() -> None:
    raise Awkward(1, 2)


def leave(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(30)


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def leave_politely() -> None:
    sys.exit(3)


def environment() -> list[str]:
    return [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")]


@pytest.fixture(scope="module")
def own() -> Iterator[Pool]:
    """A pool of two that these tests may break."""
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.mark.parametrize("world_size", [1, 2])
def test_results_come_in_rank_order(pool: Pools, world_size: int) -> None:
    expected = sum(10 + rank for rank in range(world_size))
    assert pool(world_size).run(total, 10) == [(rank, expected, 1) for rank in range(world_size)]


def test_pools_are_kept(pool: Pools) -> None:
    assert pool(2) is pool(2)
    pool(2).run(total, 0)
    before = pool(2).pids
    pool(2).run(total, 0)
    assert pool(2).pids == before


def test_run_many_gives_the_ranks_of_each_case(pool: Pools) -> None:
    results = pool(2).run_many(total, [(1,), (2,), (3,)])
    assert [[value for _, value, _ in ranks] for ranks in results] == [[3, 3], [5, 5], [7, 7]]
    assert pool(2).run_many(total, []) == []


def test_environment_is_that_of_torchrun(pool: Pools) -> None:
    assert pool(2).run(environment) == [["0", "0", "2", "2"], ["1", "1", "2", "2"]]


def test_tensors_travel_by_value(pool: Pools) -> None:
    given = {
        "leaf": torch.randn(3, dtype=torch.float64, requires_grad=True),
        "none": torch.empty(0, 4),
        "scalar": torch.tensor(True),
    }
    for result in pool(2).run(tensors, given):
        for name, value in given.items():
            assert torch.equal(result[name], value)
            assert (result[name].dtype, result[name].shape) == (value.dtype, value.shape)
            assert result[name].requires_grad == value.requires_grad
        assert result["view"].tolist() == [10, 11, 12]
        assert result["view"].untyped_storage().nbytes() == 24
        assert result["half"].dtype == torch.bfloat16
        assert torch.equal(result["turned"], torch.ones(3, 2))


def test_exception_of_every_rank_keeps_the_workers(own: Pool) -> None:
    own.run(total, 0)
    before = own.pids
    with pytest.raises(ValueError, match=r"^no bread on rank [01]$") as caught:
        own.run(refuse, "bread")
    cause = caught.value.__cause__
    assert isinstance(cause, RemoteTraceback)
    assert "of 2" in str(cause)
    assert 'raise ValueError(f"no {word}' in str(cause)
    assert own.pids == before
    assert own.run(total, 1)[0] == (0, 3, 1)


def test_exception_of_one_rank_does_not_wait_for_the_others(own: Pool) -> None:
    began = time.monotonic()
    with pytest.raises(KeyError, match="alone") as caught:
        own.run(refuse_on, 1)
    assert "on rank 1 of 2" in str(caught.value.__cause__)
    assert time.monotonic() - began < 30
    assert own.pids == []
    assert own.run(total, 1)[1] == (1, 3, 1)


def test_exception_names_its_case(own: Pool) -> None:
    with pytest.raises(ValueError, match="two") as caught:
        own.run_many(refuse_case, [(0,), (1,), (2,)])
    assert "case 2" in str(caught.value.__cause__)


def test_exception_that_cannot_be_pickled_is_named(own: Pool) -> None:
    with pytest.raises(WorkerError, match="Awkward: 1 and 2"):
        own.run(raise_awkward)


def test_dead_worker_is_reported_and_replaced(own: Pool) -> None:
    with pytest.raises(WorkerError, match=r"rank 1 of 2 died in .*leave: SIGSEGV(.|\n)*Fatal Python error"):
        own.run(leave, 1)
    assert own.run(total, 1)[0] == (0, 3, 1)


def test_hang_is_reported_with_stacks_and_the_pool_replaced(own: Pool) -> None:
    own.run(total, 0)
    with pytest.raises(WorkerError, match=r"no answer from rank \[0, 1\] of 2 within 1 s(.|\n)*in sleep"):
        own.run(sleep, 60, timeout=1)
    assert own.run(total, 1)[0] == (0, 3, 1)


def test_exit_of_the_called_function_does_not_end_the_worker(own: Pool) -> None:
    with pytest.raises(SystemExit) as caught:
        own.run(leave_politely)
    assert caught.value.code == 3
    assert len(own.pids) == 2


def test_wrong_device_type_is_refused() -> None:
    with pytest.raises(ValueError, match="device_type must be 'cpu', 'cuda' or 'shared', got 'tpu'"):
        Pool(2, "tpu")


@pytest.mark.gpu(2)
def test_nccl_workers_have_a_device_each(pool: Pools) -> None:
    assert pool(2, "cuda").run(cuda_total) == [(0, 1.0), (1, 1.0)]


def cuda_total() -> tuple[int, float]:
    value = torch.full((1,), float(dist.get_rank()), device="cuda")
    dist.all_reduce(value)
    return torch.cuda.current_device(), value.item()
