"""The kernel contract: what a backend is asked, what it is given, and what it must answer.

A backend, of this package or of another, needs no name from elsewhere; what a call is, is told in `call.py`.

Shapes: T query rows, S key rows, H query heads, K key/value heads (H a multiple of K), D head dim, V value head dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from ringattn.kernels.call import Block, Call, CallTensors, Range, to_device

__all__ = [
    "Backend",
    "Block",
    "Call",
    "CallSpec",
    "CallTensors",
    "Capability",
    "Dropout",
    "Grads",
    "Options",
    "Range",
    "SavedCall",
    "Sum",
    "accumulation_dtype",
    "to_device",
]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what partial results of `dtype` are added: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class CallSpec:
    """What a backend is asked whether it can do: everything that changes the mathematics or the memory layout."""

    device: str
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    query_heads: int
    key_heads: int
    window: bool = False
    softcap: float = 0.0
    dropout_p: float = 0.0
    deterministic: bool = False

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the optional features that are asked for; they are fields of `Capability`."""
        asked = {
            "window": self.window,
            "softcap": bool(self.softcap),
            "dropout": bool(self.dropout_p),
            "unequal_head_dims": self.head_dim != self.value_dim,
        }
        return tuple(name for name, wanted in asked.items() if wanted)


@dataclass(frozen=True)
class Capability:
    """What a backend declares that it can do, forward and backward.

    Arguments:
        devices: device types of tensors; empty: any.
        dtypes: empty: every floating dtype.
        max_head_dim: of queries and keys, and of values; None: any. `head_dim_multiple` divides them.
        compute_capability: the lowest CUDA one, and the one above the highest, or None.
        window, softcap, dropout, unequal_head_dims: forward and backward, with exact mathematics.
        deterministic: gradients can be asked to be bitwise equal from run to run; without it such a request only warns.
        adds: gradients can be added to sums before they are rounded (`Grads.sums`).
        distributions: Python packages that hold the kernel: another version of one makes measured times void.
    """

    devices: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    max_head_dim: int | None = None
    head_dim_multiple: int = 1
    compute_capability: tuple[tuple[int, int], tuple[int, int]] | None = None
    window: bool = True
    softcap: bool = False
    dropout: bool = False
    unequal_head_dims: bool = False
    deterministic: bool = False
    adds: bool = False
    distributions: tuple[str, ...] = ()

    def refusal(self, spec: CallSpec) -> str | None:
        """Why `spec` is outside of what is declared, as the rest of the sentence "it ...", or None."""
        if self.devices and spec.device not in self.devices:
            return f"runs on {' and '.join(self.devices)} tensors only, got {spec.device}"
        if self.dtypes and spec.dtype not in self.dtypes:
            names = " and ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            return f"takes {names}, got {spec.dtype}: cast the model or use autocast"
        for name in spec.features:
            if not getattr(self, name):
                dims = f", got {spec.head_dim} and {spec.value_dim}" if name == "unequal_head_dims" else ""
                return f"has no {name.replace('_', ' ')}{dims}"
        for dim in (spec.head_dim, spec.value_dim):
            if self.max_head_dim is not None and dim > self.max_head_dim:
                return f"takes head dims up to {self.max_head_dim}, got {dim}"
            if dim % self.head_dim_multiple:
                return f"takes head dims that are multiples of {self.head_dim_multiple}, got {dim}"
        return self._wrong_device()

    def _wrong_device(self) -> str | None:
        if self.compute_capability is None:
            return None
        if not torch.cuda.is_available():
            return "needs a CUDA device, and there is none"
        found = torch.cuda.get_device_capability()
        low, high = self.compute_capability
        if not low <= found < high:
            return f"needs compute capability {low[0]}.{low[1]} to below {high[0]}.{high[1]}, got {found[0]}.{found[1]}"
        return None


class Backend(Protocol):
    """A flash kernel. `forward` and `backward` obey one convention whatever the kernel's own.

    - `out` (T, H, V) is written in place; lse (H, T), natural logarithm, float32 (float64 for float64 inputs).
    - Tensors may be views: rows of some of the heads, or columns of a message.
    - A query row without keys has out 0 and lse -inf; in the backward pass its gradients are 0.
    - `backward` takes the out and lse of the *whole* softmax, of which the call may be a part, and writes dq, dk, dv in
      place; key rows that no block reads may hold anything afterwards. A backend that `adds` is also given sums, and
      leaves key rows that no block reads alone.

    docs/adding-a-backend.md shows a whole one.
    """

    name: str
    capability: Capability

    def missing(self) -> str | None:
        """Why the package or operator is not there, as the rest of the sentence "it ...", or None. Must not raise, and
        must look again after a failure: an installation may be repaired while the process runs."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, options: "Options", out: torch.Tensor
    ) -> torch.Tensor:
        """Attention of q (T, H, D) over k (S, K, D), v (S, K, V): rows `call.q` and `call.k`; returns lse (H, T)."""

    def backward(self, dout: torch.Tensor, saved: "SavedCall", grads: "Grads") -> None:
        """Gradients of this call's share into `grads`, shaped as q, k, v; `dout` is (T, H, V)."""


@dataclass(frozen=True)
class Dropout:
    """Attention dropout of one call, decided by seed and global places, so that no split changes it.

    Arguments:
        p: probability of dropping a probability; the others are divided by 1 - p.
        seed: of this attention, the same on every rank.
        q_index, k_index: (T,), (S,) global index of each row of the call.
        first_head: global number of the call's first query head.
    """

    p: float
    seed: int
    q_index: torch.Tensor
    k_index: torch.Tensor
    first_head: int


@dataclass(frozen=True)
class Options:
    """What is asked of every call of an attention; `dropout` alone differs from call to call."""

    scale: float
    softcap: float = 0.0
    deterministic: bool = False
    dropout: Dropout | None = None


class SavedCall(NamedTuple):
    """A call as its backward pass needs it: what went into its forward pass, and the result of all keys.

    A named tuple and not a dataclass, as one is made for every call and that is several times as fast.
    """

    q: torch.Tensor  # (T, H, D)
    k: torch.Tensor  # (S, K, D)
    v: torch.Tensor  # (S, K, V)
    out: torch.Tensor  # (T, H, V), of the whole softmax
    lse: torch.Tensor  # (H, T), of the whole softmax; perhaps columns of a wider one
    call: Call
    options: Options


class Sum(NamedTuple):
    """Rows of a gradient that have parts from several calls: the call's is added to `wide` and not written.

    Parts that are rounded before they are added make a sum of many of them 1.2 times as wrong as one call's result.
    A fresh sum holds nothing yet: the call's part, which has all of its rows, is written.
    """

    rows: Range  # of the call's gradient
    wide: torch.Tensor  # (rows, heads, dim) in accumulation precision
    fresh: bool = False

    def add(self, part: torch.Tensor, span: Range, target: torch.Tensor) -> None:
        """Bring `part`, rows `span` of the gradient, home: to the sum, and what lies outside of it to `target`."""
        first, last = max(span[0], self.rows[0]), min(span[1], self.rows[1])
        if first >= last:
            target[slice(*span)] = part
            return
        total, own = self.wide[first - self.rows[0] : last - self.rows[0]], part[first - span[0] : last - span[0]]
        if self.fresh:
            total.copy_(own)
        else:
            total += own
        target[span[0] : first] = part[: first - span[0]]
        target[last : span[1]] = part[last - span[0] :]


@dataclass(frozen=True)
class Grads:
    """Where the gradients of a call go: tensors shaped as q, k and v, and for each the sum of its shared rows.

    Rows are shared where several calls see the same queries or keys; only backends that `adds` get sums.
    """

    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    sums: tuple[Sum | None, Sum | None, Sum | None] = (None, None, None)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.tensors)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.dq, self.dk, self.dv

    def deliver(self, which: int, part: torch.Tensor, span: Range) -> None:
        """Write rows `span` of dq (0), dk (1) or dv (2), or add those that are part of a sum."""
        target, total = self.tensors[which], self.sums[which]
        if total is None:
            target[slice(*span)] = part
        else:
            total.add(part, span, target)
