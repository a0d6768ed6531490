"""Ranks hear each other before they have a process group, also in a store that others have used."""

import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from ringattn.training.start import meeting
from ringattn.training.start.launched import Launch, free_port
from ringattn.training.start.meeting import CannotStart, Meeting, Missing


@pytest.fixture
def port(monkeypatch):
    """Of a store that torchrun's agent would hold."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(meeting, "HEARD", 1.0)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    yield store.port
    del store


def at_once(port: int, words: list, seconds: float = 20.0) -> list:
    """What comes of a meeting of threads in the place of ranks: each says a word, refuses, or is absent (None)."""
    found: list = [None] * len(words)

    def rank(number: int) -> None:
        launch = Launch("torchrun", number, len(words), number, len(words), "127.0.0.1", port)
        time.sleep(0.1 * (len(words) - number))  # rank 0 comes last
        try:
            one = Meeting(launch, seconds)
            word = words[number]
            found[number] = one.refuse(str(word)) if isinstance(word, Exception) else one.everyone(word)
        except CannotStart as error:
            found[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number, word in enumerate(words) if word is not None]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return found


def test_all_hear_all_and_nothing_of_an_earlier_start_is_left(port):
    first, second, third = at_once(port, ["a", "b", ValueError("no data here")])
    assert isinstance(first, CannotStart)
    assert str(first) == str(second) == "rank 2 cannot start: no data here"
    assert third is True  # rank 0 has said it
    assert at_once(port, ["a", "b", "a"]) == [["a", "b", "a"]] * 3
    assert at_once(port, ["c", "c"]) == [["c", "c"]] * 2


class Looked:
    """A store after whose first look at refusals in vain, once the other rank is there, that one refuses."""

    def __init__(self, store: dist.Store, there: threading.Event, looked: threading.Event, refused: threading.Event):
        self._store, self._events = store, (there, looked, refused)

    def __getattr__(self, name: str):
        return getattr(self._store, name)

    def check(self, keys: list[str]) -> bool:
        there, looked, refused = self._events
        found = self._store.check(keys)
        if keys == [meeting.REFUSED] and not found and there.is_set() and not looked.is_set():
            looked.set()
            refused.wait(10)
        return found


def test_a_refusal_right_after_a_look_is_heard(port):
    """The others waited for a word that never came."""
    there, looked, refused = events = [threading.Event() for _ in range(3)]

    def other() -> None:
        one = Meeting(Launch("torchrun", 1, 2, 1, 2, "127.0.0.1", port), 20.0)
        there.set()
        looked.wait(10)
        one.store.compare_set(meeting.REFUSED, "", "1\nno data here")
        one.store.add(meeting.ARRIVED, 1)
        refused.set()

    thread = threading.Thread(target=other)
    thread.start()
    one = Meeting(Launch("torchrun", 0, 2, 0, 2, "127.0.0.1", port), 20.0)
    one.store = Looked(one.store, *events)
    with pytest.raises(CannotStart, match="rank 1 cannot start: no data here"):
        one.everyone("a")
    thread.join(10)


def test_who_does_not_come_is_named_by_all(port):
    first, _, third = at_once(port, ["a", None, "c"], seconds=1.0)
    assert isinstance(first, Missing)
    assert str(first) == str(third) == "rank 1 did not come within run.start_timeout=1 s"


def test_without_rank_0_nobody_waits_for_ever(port):
    _, second = at_once(port, [None, "b"], seconds=0.5)
    assert str(second) == "rank 0 did not come within run.start_timeout=0.5 s"


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="only Linux lists who listens")
def test_rank_0_listens_on_loopback_alone(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    number = free_port()
    one = Meeting(Launch("slurm", 0, 2, 0, 2, "127.0.0.1", number), 5.0)
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    rows += [line.split() for line in Path("/proc/net/tcp6").read_text().splitlines()[1:]]
    listening = [row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{number:04X}")]
    assert listening == [f"0100007F:{number:04X}"]
    with pytest.raises(CannotStart, match=rf"rank 0 cannot meet at 127\.0\.0\.1:{number}"):
        Meeting(Launch("slurm", 0, 2, 0, 2, "127.0.0.1", number), 5.0)
    del one
