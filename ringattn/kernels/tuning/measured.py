"""The call that stands for a batch when something is measured, and the facts that its result is valid for."""

import importlib.metadata
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ringattn.kernels.registry import backends
from ringattn.kernels.spec import Backend, Block, Call, CallSpec, Grads, Options, SavedCall
from ringattn.kernels.tuning.tuner import Key, bucket

# Most rows of a measured call: in longer ones the speed per row and key is what it is at this length.
LONGEST = {"cuda": 32_768, "cpu": 1_024}


class MeasuredCall:
    """A call over causal documents of one length that stand for those of a batch, with random values.

    Lengths are rounded, so that a batch with a few tokens more is the same call. Zeros would make the softmax cheaper
    than it is in training.
    """

    def __init__(self, spec: CallSpec, lengths: Sequence[int]) -> None:
        cap = LONGEST.get(spec.device, LONGEST["cpu"])
        self.spec = spec
        self.longest = min(bucket(max(lengths, default=0)), cap)
        self.tokens = max(self.longest, min(bucket(sum(lengths)), cap))
        self._tensors: tuple[Tensor, ...] | None = None

    @property
    def call(self) -> Call:
        count = self.tokens // self.longest if self.longest else 0
        spans = [(i * self.longest, (i + 1) * self.longest) for i in range(count)]
        return Call(tuple(Block(span, span) for span in spans), self.longest // 4 if self.spec.window else -1, 0)

    def key(self, operation: str, **facts: Any) -> Key:
        return _key_of(operation, self.spec, self.longest, self.tokens, tuple(sorted(facts.items())))

    def run(self, backend: Backend) -> None:
        """Forward and backward once, without dropout."""
        call = self.call
        if not call.blocks:
            return
        options = Options(self.spec.head_dim**-0.5, softcap=self.spec.softcap, deterministic=self.spec.deterministic)
        q, k, v, dout, out, dq, dk, dv = self._drawn_tensors(call.q[1])
        with torch.no_grad(), torch.autocast(self.spec.device, enabled=False):
            lse = backend.forward(q, k, v, call, options, out)
            backend.backward(dout, SavedCall(q, k, v, out, lse, call, options), Grads(dq, dk, dv))

    def _drawn_tensors(self, rows: int) -> tuple[Tensor, ...]:
        if self._tensors is None:
            spec = self.spec
            q, out = (rows, spec.query_heads, spec.head_dim), (rows, spec.query_heads, spec.value_dim)
            k, v = (rows, spec.key_heads, spec.head_dim), (rows, spec.key_heads, spec.value_dim)
            generator = torch.Generator(spec.device).manual_seed(0)
            self._tensors = tuple(
                torch.randn(shape, generator=generator, device=spec.device).to(spec.dtype)
                for shape in (q, k, v, out, out, q, k, v)
            )
        return self._tensors


@cache
def _key_of(operation: str, spec: CallSpec, longest: int, tokens: int, facts: tuple[tuple[str, Any], ...]) -> Key:
    return Key.of(
        operation,
        spec.device,
        _versions(),
        dtype=str(spec.dtype).removeprefix("torch."),
        heads=f"{spec.query_heads}/{spec.key_heads}",
        dims=f"{spec.head_dim}/{spec.value_dim}",
        window=spec.window,
        softcap=bool(spec.softcap),
        dropout=bool(spec.dropout_p),
        deterministic=spec.deterministic,
        longest=longest,
        tokens=tokens,
        **dict(facts),
    )


@cache
def _versions() -> dict[str, str]:
    """Of the packages whose kernels are measured: another version is another result."""
    found = {}
    for name in {name for backend in backends().values() for name in backend.capability.distributions}:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
