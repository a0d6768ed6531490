"""When a rank fails, the others say which and why, and not that connections were lost."""

import pytest
import torch.distributed as dist

from ringattn import first_failure
from ringattn.first_failure import FirstFailure, PeerFailed

LOST = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]")


@pytest.fixture
def store(monkeypatch) -> dist.HashStore:
    found = dist.HashStore()
    monkeypatch.setattr(first_failure, "_store", lambda: found)
    monkeypatch.setattr(first_failure, "PATIENCE", 0.2)
    return found


def fails(error: Exception, rank: int, monkeypatch, before: str = "") -> Exception:
    """What comes out of a rank that fails with `error`; it began when `before` had been said."""
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    failures = FirstFailure()
    failures._before = before

    @failures
    def work() -> None:
        raise error

    with pytest.raises(Exception, match=r".") as raised:
        work()
    return raised.value


def test_who_lost_a_connection_names_the_first_to_fail(store, monkeypatch):
    fault = ArithmeticError("the fault")
    assert fails(fault, 3, monkeypatch) is fault
    assert fails(ValueError("a later one"), 2, monkeypatch).args == ("a later one",)
    for lost in (LOST, dist.DistBackendError("NCCL"), ConnectionResetError("reset")):
        found = fails(lost, 0, monkeypatch)
        assert isinstance(found, PeerFailed)
        assert str(found) == "rank 3 failed first: ArithmeticError: the fault"
        assert found.__cause__ is lost


def test_a_rank_that_was_killed_says_nothing(store, monkeypatch):
    assert "killed" in str(fails(LOST, 0, monkeypatch))
    wrapped = RuntimeError("a library's own words")
    wrapped.__cause__ = LOST
    assert "killed" in str(fails(wrapped, 1, monkeypatch))


def test_a_store_that_went_with_its_rank_hides_no_error(monkeypatch):
    def gone():
        raise dist.DistNetworkError("no store")

    monkeypatch.setattr(first_failure, "_store", gone)
    monkeypatch.setattr(first_failure, "PATIENCE", 0.2)
    fault = ArithmeticError("the fault")
    assert fails(fault, 3, monkeypatch) is fault
    assert isinstance(fails(LOST, 0, monkeypatch), PeerFailed)


def test_one_failure_is_told_once(store, monkeypatch):
    """What was said of a failure that somebody caught is no reason of a later one."""
    once = FirstFailure()
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    with pytest.raises(ArithmeticError), once, once:
        raise ArithmeticError("caught")
    with pytest.raises(PeerFailed, match="was killed"), once:
        raise LOST
    store.set(first_failure.KEY, "rank 2 failed first: ValueError: another")
    with pytest.raises(PeerFailed, match="rank 2 failed first: ValueError: another"), once:
        raise LOST
