"""A discrete-event engine: tasks that wait for others and hold resources, one holder at a time. Pure."""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

Resource = int


@dataclass
class Work:
    """Tasks by number, with what each waits for and holds.

    A task begins when all that it waits for are done and all its resources are free; of those that wait for a resource,
    the one that came first is asked first. A task without resources only takes time.
    """

    seconds: list[float] = field(default_factory=list)
    resources: list[tuple[Resource, ...]] = field(default_factory=list)
    followers: list[list[int]] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)

    def add(self, seconds: float, after: Sequence[int] = (), resources: tuple[Resource, ...] = ()) -> int:
        """A new task; returns its number."""
        number = len(self.seconds)
        self.seconds.append(seconds)
        self.resources.append(resources)
        self.followers.append([])
        self.missing.append(0)
        for before in after:
            self.link(before, number)
        return number

    def link(self, before: int, after: int) -> None:
        """`after` waits for `before` too."""
        self.followers[before].append(after)
        self.missing[after] += 1

    def run(self) -> tuple[list[float], list[float]]:
        """Begin and end of every task, in seconds from the start. Raises ValueError if tasks wait for one another."""
        return _Run(self).times()


class _Run:
    """Work while time passes: what has ended, what is held, and who waits at which resource."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.missing = list(work.missing)
        self.begin = [0.0] * len(work.seconds)
        self.end = [0.0] * len(work.seconds)
        self.busy: set[Resource] = set()
        self.queues: dict[Resource, deque[int]] = {}
        self.events: list[tuple[float, int]] = []
        self.done = 0

    def times(self) -> tuple[list[float], list[float]]:
        for number, missing in enumerate(self.missing):
            if not missing:
                self._start(number, 0.0)
        while self.events:
            now, number = heapq.heappop(self.events)
            self.done += 1
            for resource in self.work.resources[number]:
                self.busy.discard(resource)
            # Those that waited for a link go before those that become ready now.
            for resource in self.work.resources[number]:
                self._wake(resource, now)
            for follower in self.work.followers[number]:
                self.missing[follower] -= 1
                if not self.missing[follower]:
                    self._start(follower, now)
        if self.done < len(self.begin):
            raise ValueError(f"{len(self.begin) - self.done} tasks wait for one another and can never begin")
        return self.begin, self.end

    def _start(self, number: int, now: float) -> None:
        """Begin a ready task, or queue it at the first resource that is taken."""
        for resource in self.work.resources[number]:
            if resource in self.busy:
                self.queues.setdefault(resource, deque()).append(number)
                return
        self.busy.update(self.work.resources[number])
        self.begin[number] = now
        self.end[number] = now + self.work.seconds[number]
        heapq.heappush(self.events, (self.end[number], number))

    def _wake(self, resource: Resource, now: float) -> None:
        queue = self.queues.get(resource)
        for _ in range(len(queue) if queue else 0):
            if resource in self.busy:
                return
            assert queue is not None
            self._start(queue.popleft(), now)
