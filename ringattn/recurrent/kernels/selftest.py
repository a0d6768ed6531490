"""A kernel of another package is trusted for each signature by itself: before its first use a small case is computed
forward and backward, with first and last states, and compared with float64.

What is installed may be wrong in silence, or lack a feature: a gradient through the last state, or pieces of one token.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ringattn.kernels.apart import in_a_thread
from ringattn.recurrent.kernels.chunked import Chunked
from ringattn.recurrent.kernels.contract import Inputs, Kernel, Signature
from ringattn.recurrent.kernels.verdicts import keep_failure, kept_failure

# Relative errors of a kernel by name, for inputs, lengths of pieces and first states.
Judge = Callable[[Kernel, Inputs, tuple[int, ...], Tensor], dict[str, float]]

LENGTHS = (150, 1, 64, 70)  # more and fewer tokens than a chunk, one chunk, one token
# Errors relative to float64 of a right kernel are 5e-3 in bfloat16; a wrong one is off by 1e-1 and more.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}
HEADS = 64  # value heads of a case at most, if as many share a key head as in the call
NAMES = ("dq", "dk", "dv", "ddecay", "dbeta", "dstep")


_results: dict[tuple[str, Signature], str | None] = {}


def failure(kernel: Kernel, signature: Signature) -> str | None:
    """Why a kernel is wrong for a signature, as the rest of the sentence "it ...", or None.

    Computed once in a process; wrong numbers are kept on disk, for a kernel may take minutes to compile.
    """
    key = kernel.name, signature
    if key not in _results:
        _results[key] = kept_failure(kernel, signature) or in_a_thread(lambda: _failure(kernel, signature))
    return _results[key]


def forget() -> None:
    """Test every signature anew, after a kernel was installed or repaired."""
    _results.clear()


def _failure(kernel: Kernel, signature: Signature) -> str | None:
    for case, judge in cases(signature):
        try:
            errors = judge(kernel, *drawn(case))
        except Exception as error:  # whatever a kernel or its compiler raises
            return f"failed its self-test: {type(error).__name__}: {str(error)[:200]}"
        wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE[case.dtypes[1] or torch.half]}
        if wrong:
            told = ", ".join(f"{name} {error:.2g}" for name, error in wrong.items())
            reason = f"is wrong at dims {case.key_dim}/{case.value_dim} (relative error of {told})"
            keep_failure(kernel, signature, reason)
            return reason
    return None


def cases(signature: Signature) -> list[tuple[Signature, Judge]]:
    """The call's own, and for the delta rule the one that finds a piece's map beside its state, forward alone:
    autograd never goes through it."""
    group = signature.heads // signature.key_heads
    keys = min(signature.key_heads, max(1, HEADS // group))
    case = replace(signature, key_heads=keys, heads=keys * min(group, HEADS))
    wider = replace(case, value_dim=case.value_dim + case.key_dim)
    return [(case, errors_both_ways), *([(wider, errors_forward)] if signature.delta else [])]


def drawn(case: Signature, lengths: tuple[int, ...] = LENGTHS) -> tuple[Inputs, tuple[int, ...], Tensor]:
    """A case's inputs, lengths of pieces, and first states: heads forget slowly and at once."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu")

    t, (K, H, D, V) = sum(lengths), (case.key_heads, case.heads, case.key_dim, case.value_dim)
    q, k, v = draw(t, K, D) * D**-0.5, F.normalize(draw(t, K, D), dim=-1), draw(t, H, V)
    speed = torch.logspace(-2, 0.5, H)
    decay = -draw(t, H, D).abs() * speed[:, None] if case.diagonal else -draw(t, H).abs() * speed
    step = draw(t, H).abs() if case.steps else None
    if step is not None:
        decay = -speed.expand(t, H)
    beta = draw(t, H).sigmoid() if case.delta else None
    state = draw(len(lengths), H, D, V)
    wide = zip((q, k, v, decay, beta, step), (case.dtypes[0], *case.dtypes), strict=True)
    rows = [None if x is None else x.to(case.device, dtype) for x, dtype in wide]
    return Inputs(*rows), lengths, state.to(case.device)  # type: ignore[arg-type]


def errors_forward(kernel: Kernel, x: Inputs, lengths: tuple[int, ...], state: Tensor) -> dict[str, float]:
    """Relative errors against float64 of outputs and last states."""
    with torch.no_grad():
        right, got = Chunked().run(_wide(x), lengths, state.double()), kernel.run(x, lengths, state)
    return {name: _relative(a, b) for name, a, b in zip(("out", "last state"), got, right, strict=True)}


def errors_both_ways(kernel: Kernel, x: Inputs, lengths: tuple[int, ...], state: Tensor) -> dict[str, float]:
    """Relative errors against float64: of outputs, last states and all gradients, and of outputs from empty states."""
    expected = _both_ways(Chunked(), _wide(x), lengths, state.double())
    found = _both_ways(kernel, x, lengths, state)
    errors = {name: _relative(found[name], one) for name, one in expected.items()}
    if x.step is not None:
        # Of a rate that is the same in all rows, a kernel may put the sum of its gradient into any. That sum may nearly
        # cancel: rounding is judged by what is added.
        sums = found["ddecay"].double().sum(0) - expected["ddecay"].sum(0)
        errors["ddecay"] = (sums.norm() / expected["ddecay"].norm()).item()
    return errors


def _wide(x: Inputs) -> Inputs:
    return Inputs(*(None if one is None else one.double() for one in x))  # type: ignore[arg-type]


def _both_ways(kernel: Kernel, x: Inputs, lengths: tuple[int, ...], state: Tensor) -> dict[str, Tensor]:
    with torch.enable_grad():
        leaves, first = x.leaves(), state.detach().requires_grad_()
        out, last = kernel.run(leaves, lengths, first)
        whole = kernel.outputs(leaves, lengths)
        # Weights that every version of the call shares, without a copy: the inputs' own numbers.
        weights = [x.v.flip(0), state.flip(0).to(last), x.v.roll(1, 0)]
        wanted = [one for one in (*leaves, first) if one is not None]
        grads = iter(
            torch.autograd.grad([out, last, whole], wanted, [weights[0].to(out), weights[1], weights[2].to(whole)])
        )
    named = {name: next(grads) for name, one in zip(NAMES, leaves, strict=True) if one is not None}
    return {"out": out, "last state": last, "out alone": whole, **named, "dstate": next(grads)}


def _relative(x: Tensor, reference: Tensor) -> float:
    return ((x.detach().double() - reference.detach()).norm() / reference.norm()).item()
