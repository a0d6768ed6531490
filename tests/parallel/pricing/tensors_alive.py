"""What a rank's stages hold at one time: all but the arithmetic, on tensors without memory."""

from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ringattn.kernels.spec import Options
from ringattn.parallel.execution import executor, stages
from ringattn.parallel.execution import key_transfers as rows
from ringattn.parallel.plan.plan import AttentionPlan
from ringattn.parallel.plan.route import Route
from ringattn.parallel.plan.shape import Shape


class Alive(TorchDispatchMode):
    """Notes the most bytes that tensors have at one time, beside those of `known` ones."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.most = 0
        self._known = {x.untyped_storage()._cdata for x in known}
        self._found: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self._found = {key: pair for key, pair in self._found.items() if not pair[0].expired()}
        for x in tree_leaves(result):
            if not isinstance(x, Tensor) or not x.is_floating_point() or not x.dim():
                continue  # tables of rows are kept with the plan
            if (key := x.untyped_storage()._cdata) not in self._known:
                self._found[key] = StorageWeakRef(x.untyped_storage()), x.untyped_storage().nbytes()
        self.most = max(self.most, self.now())
        return result

    def now(self) -> int:
        """Bytes of those that are alive."""
        return sum(size for storage, size in self._found.values() if not storage.expired())


class Nothing:
    """A backend that adds and a transport, which compute and move nothing.

    Arguments:
        own: where messages are sent from, if not from memory of their own.
    """

    name, reason = "nothing", ""

    def __init__(self, own: dict[torch.dtype, Tensor]) -> None:
        self._own = own

    def forward(self, q: Tensor, *_: Any) -> Tensor:
        return q.new_empty(q.shape[1], 0)  # the lse is not stated

    def backward(self, *_: Any) -> None: ...

    def buffer(self, route: Route, like: Tensor) -> Tensor:
        return self._own[like.dtype][: route.sent] if self._own else like.new_empty(route.sent)

    def message(self, x: Tensor, route: Route) -> Tensor:
        return x

    def exchange(self, send: Tensor, receive: Tensor, route: Route) -> "_Pending":
        return _Pending([send, receive])


def message_buffers(engines: bool) -> dict[torch.dtype, Tensor]:
    """Those of copy engines, if they move an axis' messages."""
    dtypes = (torch.bfloat16, torch.float32) if engines else ()
    return {dtype: torch.empty(1 << 30, dtype=dtype, device="meta") for dtype in dtypes}


class _Pending:
    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors

    def wait(self) -> None:
        self.tensors.clear()


def forgets(*_: Any, **__: Any) -> None:
    """In place of functions that fill tensors; a mock would remember them."""


def no_lse(_: Any) -> Tensor:
    return torch.empty(0, 0, device="meta")


class _Attention:
    """One rank's attention by a plan: its tensors, and a job that computes and moves nothing."""

    def __init__(self, plan: AttentionPlan, shape: Shape, rows: int, axis: str) -> None:
        self.q = torch.empty(rows, shape.query_heads, shape.head_dim, dtype=torch.bfloat16, device="meta")
        self.k = self.q.new_empty(rows, shape.key_heads, shape.head_dim)
        self.v = self.q.new_empty(rows, shape.key_heads, shape.value_dim)
        self.out, self.dout = (self.q.new_empty(rows, shape.query_heads, shape.value_dim) for _ in range(2))
        self.buffers = message_buffers(axis in plan.engines)
        nothing: Any = Nothing(self.buffers)
        self.job = stages.Job(
            plan, (0, rows), Options(1.0), None, nothing, True, nothing, nothing, self.q.device,
            shape.query_heads, shape.key_heads,
        )  # fmt: skip

    def alive(self, *known: Tensor) -> Alive:
        return Alive(self.q, self.k, self.v, self.out, self.dout, *self.buffers.values(), *known)


def most_alive(plan: AttentionPlan, shape: Shape) -> tuple[int, int]:
    """Bytes beside inputs and results of a forward pass, and of a backward pass with the keys that are kept."""
    one = _Attention(plan, shape, plan.rows, "ring")
    with (
        mock.patch.object(rows, "take_rows", forgets),
        mock.patch.object(rows, "add_rows", forgets),
        mock.patch.object(stages._OutAndLse, "collect", forgets),
        mock.patch.object(stages._OutAndLse, "finished_lse", no_lse),
    ):
        with one.alive() as forward:
            walk = stages.forward_stages(one.job, one.q, one.k, one.v, one.out, plan.keep_keys)
            ((_, kept),) = executor.take_turns([walk])
        lse = one.q.new_empty(shape.query_heads, plan.rows, dtype=torch.float32)
        saved = stages.Saved.of(one.job, one.q, one.k, one.v, one.out, lse, kept)
        grads = [torch.empty_like(x) for x in (one.q, one.k, one.v)]
        with one.alive(*grads, *saved, *kept) as backward:
            (found,) = executor.take_turns([stages.backward_stages(one.job.backward, one.dout, saved, kept, grads)])
            for grad in found:
                grad.finish()
    keys = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in kept}
    return forward.most, backward.most + sum(keys.values())


def most_of_exchange(plan: AttentionPlan, shape: Shape) -> float:
    """Of the backward pass of an exchange without copied heads: all that is alive, but for message buffers of copy
    engines, over inputs and results."""
    assert plan.exchange is not None
    one = _Attention(plan, shape, plan.exchange.own_rows, "ulysses")
    with mock.patch.object(executor, "without_autocast", lambda _: nullcontext()):  # noqa: PT008
        (done,) = executor.forward_parts([one.job], one.q, one.k, one.v, None, one.out, keep=True)
        with one.alive() as backward:
            for x in (x for of in done.saved for x in of):
                x.detach()  # seen, so that it counts
            executor.backward_parts([one.job], one.dout, [done.saved], None, [[]])
    inputs = sum(x.nbytes for x in (one.q, one.k, one.v, one.out, one.dout))
    return (inputs + backward.most) / (inputs + sum(x.nbytes for x in (one.q, one.k, one.v)))


def left_before_results(plan: AttentionPlan, shape: Shape) -> tuple[int, int]:
    """Bytes that are alive, beside inputs and what the forward pass saved, when the backward pass of an exchange makes
    its results; and those of the messages that are under way then."""
    assert plan.exchange is not None
    one = _Attention(plan, shape, plan.exchange.own_rows, "ulysses")
    under_way: list[_Pending] = []
    found: list[tuple[int, int]] = []
    exchange, rows_of = Nothing.exchange, executor.LocalGrads.rows_of

    def noted(*arguments: Any) -> _Pending:
        under_way.append(exchange(*arguments))
        return under_way[-1]

    def first_rows(grads: Any, job: Any) -> list[Tensor]:
        if not found:
            messages = {x.untyped_storage()._cdata: x.nbytes for one in under_way for x in one.tensors}
            found.append((alive.now(), sum(messages.values())))
        return rows_of(grads, job)

    with (
        mock.patch.object(executor, "without_autocast", lambda _: nullcontext()),  # noqa: PT008
        mock.patch.object(Nothing, "exchange", noted),
        mock.patch.object(executor.LocalGrads, "rows_of", first_rows),
    ):
        (done,) = executor.forward_parts([one.job], one.q, one.k, one.v, None, one.out, keep=True)
        with one.alive(*(x for of in done.saved for x in of)) as alive:
            executor.backward_parts([one.job], one.dout, [done.saved], None, [[]])
    return found[0]
