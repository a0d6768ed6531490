"""Packages with kernels of recurrences that are not there: the signatures of theirs, computed by the torch kernel, and
perhaps with a fault."""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ringattn.recurrent.kernels.chunked import Chunked
from ringattn.recurrent.kernels.contract import Inputs
from ringattn.recurrent.kernels.fla import FUNCTIONS, Fla
from ringattn.recurrent.kernels.mamba import FUNCTION, Mamba

Fault = Callable[[Tensor, Any], tuple[Tensor, Any]]


def install(monkeypatch: pytest.MonkeyPatch, fault: Fault | None = None, **functions: Callable[..., Any]) -> None:
    """Both packages, on CPU tensors.

    Arguments:
        fault: from right outputs and last states to wrong ones.
        functions: what stands under a name instead.
    """
    made = {path: fla_function(path, fault) for path in FUNCTIONS.values()} | {FUNCTION: mamba_function(fault)}
    for path, function in made.items():
        module, _, name = path.rpartition(".")
        parts = module.split(".")
        for count in range(1, len(parts) + 1):
            one = ".".join(parts[:count])
            if one not in sys.modules or sys.modules[one].__spec__ is None:
                new = ModuleType(one)
                new.__spec__ = ModuleSpec(one, None)
                new.__path__ = []  # a package
                monkeypatch.setitem(sys.modules, one, new)
        monkeypatch.setattr(sys.modules[module], name, functions.get(name, function), raising=False)
    for kernel in (Fla, Mamba):
        monkeypatch.setattr(kernel, "devices", ("cpu",))


def fla_function(path: str, fault: Fault | None) -> Callable[..., Any]:
    """One of flash-linear-attention: a batch of one row with pieces end to end."""
    delta = next(rule[0] for rule, one in FUNCTIONS.items() if one == path)

    def run(x: Inputs, scale: float, state: Tensor | None, last: bool, cu_seqlens: Tensor) -> Any:
        lengths = tuple((cu_seqlens[1:] - cu_seqlens[:-1]).tolist())
        assert cu_seqlens.dtype == torch.int64
        assert state is None or len(state) == len(lengths)
        assert delta or x.q.shape[1] == x.v.shape[1], "key heads are not repeated"
        out, states = Chunked().run(x._replace(q=x.q * scale), lengths, state)
        out, states = (out, states) if fault is None else fault(out, states)
        return out[None], states if last else None

    def with_beta(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: Any = None, initial_state: Any = None,
        output_final_state: bool = False, cu_seqlens: Any = None, cu_seqlens_cpu: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        assert cu_seqlens_cpu.tolist() == cu_seqlens.tolist()
        return run(Inputs(q[0], k[0], v[0], g[0], beta[0]), scale, initial_state, output_final_state, cu_seqlens)

    def without(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: Any = None, initial_state: Any = None,
        output_final_state: bool = False, cu_seqlens: Any = None,
    ) -> Any:  # fmt: skip
        return run(Inputs(q[0], k[0], v[0], g[0], None), scale, initial_state, output_final_state, cu_seqlens)

    return with_beta if delta else without


def mamba_function(fault: Fault | None) -> Callable[..., Any]:
    """Of mamba-ssm: a state a row of the batch, stored value dim first."""

    def mamba_chunk_scan_combined(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Any = None, z: Any = None,
        initial_states: Any = None, seq_idx: Any = None, return_final_states: bool = False,
    ) -> Any:  # fmt: skip
        assert not (seq_idx is not None and (initial_states is not None or return_final_states))
        lengths = (x.shape[1],) if seq_idx is None else tuple(seq_idx[0].unique_consecutive(return_counts=True)[1])
        state = None if initial_states is None else initial_states.mT
        rows = Inputs(C[0], B[0], x[0], A.expand(dt.shape[1:]), None, dt[0])
        out, last = Chunked().run(rows, tuple(map(int, lengths)), state)
        out, last = (out, last) if fault is None else fault(out, last)
        return (out[None], last.mT) if return_final_states else out[None]

    return mamba_chunk_scan_combined
