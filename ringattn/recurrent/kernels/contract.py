"""The contract of a recurrence's kernel, and the affine map of a piece.

Legend: t tokens, K key heads, H value heads (a multiple of K: key head i serves H / K consecutive value heads), D key
dim, V value dim, n pieces.

One recurrence covers the gated delta rule, Kimi's delta attention, Mamba-2, gated linear attention, lightning attention
and, with one value head a channel, Mamba-1. With the state S (D × V) of a value head, for every token

    S ← diag(exp(decay)) · S
    S ← S + k · uᵀ,  u = beta · (v - Sᵀ k) with `beta`, the delta rule, and u = v without
    out = Sᵀ q

With `step`, Mamba's form of it, a token's v and decay are step times what is given. Kernels that are written for that
form take it as it is, the others the plain one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ringattn.recurrent.piles import Rows, taken_apart


class Inputs(NamedTuple):
    """The rows of pieces, end to end.

    Arguments:
        q, k: (t, K, D).
        v: (t, H, V).
        decay: logarithms of what is left of the state, <= 0 as a rule: (t, H), or (t, H, D) with one a key dim.
        beta: (t, H) for the delta rule; None without.
        step: (t, H), what v and decay are multiplied with; None: 1. Then decay is the rate of each head, the same in
            every row.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    beta: Tensor | None
    step: Tensor | None = None

    @property
    def wide(self) -> torch.dtype:
        """The dtype of states: float32, or float64 where inputs are."""
        dtypes = {x.dtype for x in self if x is not None}
        return torch.float64 if torch.float64 in dtypes else torch.float32

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.v.shape[1], self.k.shape[2], self.v.shape[2]

    @property
    def map_shape(self) -> tuple[int, ...]:
        """Of a piece's map: a matrix, a diagonal or a number a head."""
        heads, D, _ = self.state_shape
        return (heads, D, D) if self.beta is not None else (heads, D) if self.decay.dim() == 3 else (heads,)

    def rows(self, index: Tensor | slice) -> "Inputs":
        """Some of the rows."""
        return Inputs(*(None if x is None else x[index] for x in self))  # type: ignore[arg-type]

    def taken_apart(self, piles: Sequence[Rows]) -> "list[Inputs]":
        """The rows of every pile, none of which is in two of them."""
        parts = [[None] * len(piles) if one is None else taken_apart(one, piles) for one in self]
        return [Inputs(*(part[pile] for part in parts)) for pile in range(len(piles))]  # type: ignore[arg-type]

    def leaves(self) -> "Inputs":
        """The same numbers at the beginning of a graph."""
        return Inputs(*(None if x is None else x.detach().requires_grad_() for x in self))  # type: ignore[arg-type]

    def plain(self) -> "Inputs":
        """The same recurrence without `step`; products are float32 or wider."""
        if self.step is None:
            return self
        step = self.step.to(self.wide)
        return self._replace(v=self.v * step[..., None], decay=self.decay * step, step=None)


@dataclass(frozen=True)
class Signature:
    """What a kernel is asked whether it can do: all that it is compiled for or branches on.

    Arguments:
        device: its type.
        dtypes: of q and k, v, decay, beta and step; None for those that are not there.
        key_heads, heads, key_dim, value_dim: K, H, D, V.
        diagonal: decays by key dim.
    """

    device: str
    dtypes: tuple[torch.dtype | None, ...]
    key_heads: int
    heads: int
    key_dim: int
    value_dim: int
    diagonal: bool

    @classmethod
    def of(cls, x: Inputs) -> "Signature":
        """The one of a call."""
        dtypes = (torch.promote_types(x.q.dtype, x.k.dtype), *(None if one is None else one.dtype for one in x[2:]))
        H, D, V = x.state_shape
        return cls(x.v.device.type, dtypes, x.k.shape[1], H, D, V, x.decay.dim() == 3)

    @property
    def delta(self) -> bool:
        """The delta rule."""
        return self.dtypes[3] is not None

    @property
    def steps(self) -> bool:
        """Mamba's form."""
        return self.dtypes[4] is not None

    def __str__(self) -> str:
        rule = "delta rule" if self.delta else "linear attention"
        decays = "decays by key dim" if self.diagonal else "Mamba's steps" if self.steps else "a decay a head"
        dtype = str(self.dtypes[1]).removeprefix("torch.")
        return (
            f"{rule} with {decays}, {self.key_heads} key heads of {self.key_dim} and {self.heads} value heads of "
            f"{self.value_dim}, {dtype} on {self.device}"
        )


class Kernel(Protocol):
    """What computes pieces on one device. Differentiable in all inputs and in the states.

    Arguments:
        distributions: packages whose versions decide what it computes, installed or not.
    """

    name: str
    distributions: tuple[str, ...] = ()

    def missing(self, signature: Signature) -> str | None:
        """Why what it needs for such a call is not installed, as the rest of the sentence "it ...", or None. Must not
        raise, and must look again after a failure."""

    def refusal(self, signature: Signature) -> str | None:
        """Why it is not made for such a call, as the rest of the sentence "it ...", or None. What it gives is tested
        apart. Asked without importing anything."""

    def outputs(self, x: Inputs, lengths: tuple[int, ...]) -> Tensor:
        """Those of `run` from empty states, (t, H, V): whole documents need no last state."""

    def run(self, x: Inputs, lengths: tuple[int, ...], state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The outputs and last states of pieces of `lengths`, each >= 1, from their own first states.

        Arguments:
            state: (n, H, D, V) in the wide dtype; None: all empty.

        Returns: out (t, H, V) in the dtype of v, last states (n, H, D, V) in the wide dtype.
        """


class Own(Kernel):
    """A kernel in plain torch, made for every call: others are judged by it, and it by hypothesis."""

    def missing(self, signature: Signature) -> str | None:
        return None

    def refusal(self, signature: Signature) -> str | None:
        return None

    def outputs(self, x: Inputs, lengths: tuple[int, ...]) -> Tensor:
        return self.run(x, lengths, None)[0]


def maps(kernel: Kernel, x: Inputs, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """M and U of pieces: the state at a piece's end is M · S + U of the state S at its head.

    Returns: M (n, H), (n, H, D) where decays are by key dim, (n, H, D, D) for the delta rule; U (n, H, D, V).
    """
    if x.beta is None:
        decay = x.decay.to(x.wide) if x.step is None else x.decay.to(x.wide) * x.step
        whole = torch.stack([part.sum(0) for part in decay.split(lengths)]) if lengths else decay[:0]
        return whole.exp(), kernel.run(x, lengths, None)[1]
    # Columns of the state know nothing of each other: those of U, from an empty state, stand beside those of M, the
    # piece's map of the identity when there are no values.
    heads, D, V = x.state_shape
    v = torch.cat([x.v, x.v.new_zeros(len(x.v), heads, D)], 2)
    state = torch.zeros(len(lengths), heads, D, V + D, dtype=x.wide, device=v.device)
    state[..., V:] = torch.eye(D, dtype=x.wide, device=v.device)
    last = kernel.run(x._replace(v=v), lengths, state)[1]
    return last[..., V:], last[..., :V]


def apply_map(M: Tensor, S: Tensor) -> Tensor:
    """M · S: a number, a diagonal or a matrix a head, by the dims of M (n, H), (n, H, D), (n, H, D, D)."""
    if M.dim() == 4:
        return M @ S
    return M.reshape(*M.shape, *[1] * (4 - M.dim())) * S


def compose(M: Tensor, N: Tensor) -> Tensor:
    """M · N, the map of a piece after that of the piece before it; both of one kind."""
    return M @ N if M.dim() == 4 else M * N


def transposed(M: Tensor) -> Tensor:
    """Mᵀ."""
    return M.mT if M.dim() == 4 else M


def of_value_heads(x: Tensor, heads: int) -> Tensor:
    """(t, K, D) -> (t, H, D): every key head for the value heads that it serves."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
