"""The front door of recurrences: exact over the ranks of a sequence mesh, as a function and as a module.

Shapes: t tokens of this rank, K key heads, H value heads (a multiple of K), D key dim, V value dim.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ringattn.kept import kept
from ringattn.parallel.layout import Layout
from ringattn.parallel.mesh.mesh import SequenceMesh
from ringattn.recurrent.exchange import ExchangePlan, exchange, plan_exchange
from ringattn.recurrent.kernels.contract import Inputs, Signature
from ringattn.recurrent.kernels.registry import choose_kernel
from ringattn.recurrent.plan import RecurrencePlan, check_layout, plan_recurrence
from ringattn.recurrent.price import ROUTES, RecurrenceShape, cheaper, prices
from ringattn.recurrent.scan import scan
from ringattn.recurrent.wire import Wire, wire_of
from ringattn.tracing import untraced


@untraced
def parallel_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    decay: Tensor,
    beta: Tensor | None = None,
    step: Tensor | None = None,
    backend: str = "auto",
    route: str = "auto",
) -> Tensor:
    """What one device would compute of every document by itself, for this rank's tokens. Collective, differentiable.

    Every document begins with an empty state S (D × V for each value head), and each of its tokens does

        S ← diag(exp(decay)) · S
        S ← S + k · uᵀ      with u = beta · (v - Sᵀ k), the delta rule, if `beta` is given, else u = v
        out = Sᵀ q

    With beta this is the gated delta rule (one decay a head) and Kimi's delta attention (one a key dim); without it
    Mamba-2 (k = B, q = C, v = x, decay = A, step = dt), gated linear and lightning attention. q and k are taken as they
    are: scale and normalise them before. Padding has output 0 and gradient 0. The backward pass is collective too: the
    loss of every rank must depend on its output. Where a document's pieces are and how states travel is said by
    `ringattn.recurrent.plan.plan_recurrence(layout)`, which can be printed.

    Arguments:
        q, k: (t, K, D), this rank's tokens in the order of `layout`; key head i serves value heads i H/K to
            (i + 1) H/K.
        v: (t, H, V).
        layout: who holds which tokens; built from the same documents on every rank.
        decay: (t, H), or (t, H, D): the logarithm of what is left of the state, <= 0 as a rule. With `step` (H,), a
            rate that is multiplied with it.
        beta: (t, H) or None.
        step: (t, H) or None, what v and decay are multiplied with, without beta: Mamba-2's dt.
        backend: "auto", or a name of `ringattn.recurrent.kernels.registry.KERNELS`: "mamba" and "fla" are kernels of
            the packages mamba-ssm and flash-linear-attention, "torch" computes chunks of tokens by matrix products,
            "tokens" one token after another and is what others are compared with.
        route: "scan" (states of cut documents travel), "exchange" (heads travel, as in Ulysses), or "auto": what is
            predicted to take less time, by `ringattn.recurrent.price`.

    Returns: (t, H, V) in the dtype of v; states are float32, or float64 where inputs are.
    Raises ValueError naming the argument, NotImplementedError for documents that are trees, and with every kernel's
    reason if none can do the call.
    """
    x = Inputs(q, k, v, decay, beta, step)
    _check(x, layout, route)
    if step is not None:
        x = x._replace(decay=decay.expand(step.shape))
    return _compute(x, layout, wire_of(layout.mesh), backend, route)


class ParallelRecurrence(nn.Module):
    """`parallel_recurrence` with its options, for models; it has no parameters."""

    def __init__(self, mesh: SequenceMesh, *, backend: str = "auto", route: str = "auto") -> None:
        super().__init__()
        if route not in ("auto", *ROUTES):
            raise ValueError(f"route must be auto, {' or '.join(ROUTES)}, got {route!r}")
        self.mesh, self.backend, self.route = mesh, backend, route

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        *,
        decay: Tensor,
        beta: Tensor | None = None,
        step: Tensor | None = None,
    ) -> Tensor:
        """See `parallel_recurrence`. Raises ValueError for a layout on another mesh."""
        if not layout.is_on(self.mesh):
            raise ValueError(f"layout must be on the module's mesh {self.mesh}, got one on {layout.mesh}")
        return parallel_recurrence(
            q, k, v, layout, decay=decay, beta=beta, step=step, backend=self.backend, route=self.route
        )


def shape_of(x: Inputs) -> RecurrenceShape:
    """Heads and dims of a call."""
    H, D, V = x.state_shape
    return RecurrenceShape(x.k.shape[1], H, D, V, x.beta is not None, x.decay.dim() == 3, x.v.element_size())


class RecurrenceKey(NamedTuple):
    """By what the plan of a recurrence is kept with its layout."""

    shape: RecurrenceShape
    route: str  # that was asked for


def plan_by_route(layout: Layout, key: RecurrenceKey) -> RecurrencePlan | ExchangePlan:
    """This rank's plan by the route that was asked for or, with "auto", by the cheaper one. Kept with the layout."""
    return kept(layout, key, lambda: _plan(layout, *key))


def _plan(layout: Layout, shape: RecurrenceShape, route: str) -> RecurrencePlan | ExchangePlan:
    if layout.mesh.sequence_size == 1:
        return plan_recurrence(layout)  # no document is cut
    priced = prices(layout, shape)
    if (cheaper(priced) if route == "auto" else route) == "exchange":
        return plan_exchange(layout, (shape.key_heads, shape.heads))
    return plan_recurrence(layout, rounds=priced[0].rounds)


def _compute(x: Inputs, layout: Layout, wire: Wire, backend: str, route: str) -> Tensor:
    plan = plan_by_route(layout, RecurrenceKey(shape_of(x), route))
    with _without_autocast(x.v):
        kernel = choose_kernel(_signature(x, plan), backend)
        if isinstance(plan, ExchangePlan):
            return exchange(x, plan, kernel, wire)
        return scan(x, plan, kernel, wire)


def _signature(x: Inputs, plan: RecurrencePlan | ExchangePlan) -> Signature:
    """What the kernel of this rank is called with: by the exchange, some of the heads."""
    signature = Signature.of(x)
    if isinstance(plan, RecurrencePlan):
        return signature
    # A rank without heads calls none.
    return replace(signature, key_heads=max(1, plan.shares.key_heads), heads=max(1, plan.shares.heads))


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """States are matrix products too, and must stay as wide as they are."""
    if not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def _check(x: Inputs, layout: Layout, route: str) -> None:
    """Raises ValueError naming the argument, what came and what was expected."""
    check_layout(layout)
    if layout.mesh.closed:
        raise ValueError("layout is on a mesh that was closed: make another one with init_mesh")
    if route not in ("auto", *ROUTES):
        raise ValueError(f"route must be auto, {' or '.join(ROUTES)}, got {route!r}")
    for name, one in zip(("q", "k", "v"), x[:3], strict=True):
        if one.dim() != 3 or len(one) != layout.tokens():
            raise ValueError(
                f"{name} must be ({layout.tokens()}, heads, dim), this rank's tokens, got {tuple(one.shape)}"
            )
    t, K, D = x.k.shape
    H = x.v.shape[1]
    if x.q.shape != x.k.shape:
        raise ValueError(f"q must have the shape of k, {tuple(x.k.shape)}, got {tuple(x.q.shape)}")
    if not K or H % K:
        raise ValueError(f"v must have a multiple of k's {K} heads, got {H}")
    if x.step is not None and x.beta is not None:
        raise ValueError("step must be None with beta: the delta rule has no steps")
    if x.step is not None and (tuple(x.decay.shape), tuple(x.step.shape)) != ((H,), (t, H)):
        raise ValueError(
            f"decay must be ({H},) and step ({t}, {H}), a rate a head and its steps, got {tuple(x.decay.shape)} and "
            f"{tuple(x.step.shape)}"
        )
    if x.step is None and tuple(x.decay.shape) not in ((t, H), (t, H, D)):
        raise ValueError(f"decay must be ({t}, {H}) or ({t}, {H}, {D}), got {tuple(x.decay.shape)}")
    if x.beta is not None and tuple(x.beta.shape) != (t, H):
        raise ValueError(f"beta must be ({t}, {H}) or None, got {tuple(x.beta.shape)}")
