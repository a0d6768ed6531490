"""Many ring positions on one device: each in a thread, with a transport that hands tensors over in memory."""

import queue
import threading
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from ringattn import Documents, Layout, Mask, MeshShape
from ringattn.kernels.registry import choose
from ringattn.kernels.selftest import adds
from ringattn.kernels.spec import CallSpec, Options
from ringattn.parallel.execution.executor import backward_parts, forward_parts
from ringattn.parallel.execution.job import Job
from ringattn.parallel.machine.machine import Machine
from ringattn.parallel.plan.route import Route
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.planning.planner import plan_attention
from ringattn.parallel.transport.protocol import Pending
from ringattn.settings import AttentionOptions


class _Mail:
    """Messages under way, by sender and receiver, in the order in which they were sent."""

    def __init__(self) -> None:
        self.boxes: dict[tuple[int, int], queue.Queue[Tensor]] = defaultdict(queue.Queue)


class _Arrivals:
    def __init__(self, mail: _Mail, rank: int, receive: Tensor, route: Route) -> None:
        self._mail, self._rank = mail, rank
        self._parts = [(peer, part) for peer, part in enumerate(receive.split(route.receives)) if part.numel()]

    def wait(self) -> None:
        for peer, part in self._parts:
            part.copy_(self._mail.boxes[peer, self._rank].get(timeout=120))


class ThreadTransport:
    """The ring axis of one emulated rank."""

    name, reason = "thread", ""

    def __init__(self, mail: _Mail, rank: int) -> None:
        self._mail, self._rank = mail, rank

    def buffer(self, route: Route, like: Tensor) -> Tensor:
        return like.new_empty(route.sent)

    def message(self, x: Tensor, route: Route) -> Tensor:
        return x

    def exchange(self, send: Tensor, receive: Tensor, route: Route) -> Pending:
        for peer, part in enumerate(send.split(route.sends)):
            if part.numel():
                self._mail.boxes[self._rank, peer].put(part.clone())
        return _Arrivals(self._mail, self._rank, receive, route)


def attention(
    x: dict[str, Tensor],
    docs: Documents,
    mask: Mask,
    ring: int,
    scheme: str,
    stages: int | None,
    backend: str,
    machine: Machine | None = None,
) -> dict[str, Tensor]:
    """out, dq, dk, dv of the whole stream, computed as `ring` ranks would: x holds q, k, v and dout of the stream."""
    layouts = [Layout(docs, MeshShape(1, ring, 1, rank)) for rank in range(ring)]
    mail = _Mail()
    names = {"out": "q", "dq": "q", "dk": "k", "dv": "v"}
    results = {name: torch.zeros_like(x[like]) for name, like in names.items()}
    heads, key_heads, dim = x["q"].shape[1], x["k"].shape[1], x["q"].shape[2]
    spec = CallSpec(x["q"].device.type, x["q"].dtype, dim, dim, heads, key_heads, window=mask.window != (-1, -1))
    chosen = choose(spec, backend)

    def rank_of(rank: int) -> None:
        layout = layouts[rank]
        named = scheme if ring > 1 else "auto"
        options = AttentionOptions(mask, scheme=named, stages=stages, keep_keys=False)
        plan = plan_attention(layout, Shape(heads, key_heads, dim, dim), options, machine)
        transport = ThreadTransport(mail, rank)
        q, k, v, dout = (layout.shard(x[name]) for name in ("q", "k", "v", "dout"))
        job = Job(
            plan=plan,
            rows=(0, len(q)),
            options=Options(dim**-0.5),
            dropout=None,
            backend=chosen,
            adds=adds(chosen, spec),
            ring=transport,
            ulysses=None,
            device=q.device,
            query_heads=heads,
            key_heads=key_heads,
        )
        out = torch.empty_like(dout)
        (done,) = forward_parts([job], q, k, v, None, out, keep=False)
        grads = backward_parts([job], dout, [done.saved], None, [[]])[:3]
        rows = layout.indices().to(q.device)
        for name, tensor in zip(names, (out, *grads), strict=True):
            results[name].index_copy_(0, rows, tensor)

    _in_threads(rank_of, ring)
    return results


def _in_threads(run: Callable[[int], None], count: int) -> None:
    """Run all ranks; the first error is raised here."""
    errors: list[BaseException] = []

    def guarded(rank: int) -> None:
        try:
            with torch.no_grad():
                run(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(rank,), daemon=True) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
