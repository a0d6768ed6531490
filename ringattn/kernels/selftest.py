"""A backend is trusted for each signature by itself: before its first use a small case is computed forward and backward
and compared with float64.

Versions and lists of features do not tell: FlashAttention 4 (4.0.0b36) computes gradients at head dims 40 and 80 that
are silently wrong, and none of its documents says so.
"""

from collections.abc import Callable
from dataclasses import replace
from math import nan
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ringattn.kernels.apart import in_a_thread
from ringattn.kernels.backends.reference import Reference
from ringattn.kernels.spec import Backend, Block, Call, CallSpec, Dropout, Grads, Options, SavedCall, Sum

T = TypeVar("T")

# Queries and keys of each block of the case: unequal lengths, single tokens and several kernel tiles.
LENGTHS = ((150, 150), (1, 1), (40, 170), (1, 33))
# Errors relative to float64 of a right kernel are 3e-3 in bfloat16; a wrong one is off by 1e-1 and more.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4, torch.float64: 1e-10}
SHARP = 3.0  # scale of the queries: so sharp a softmax shows a wrong band, cap or scale


class Signature(NamedTuple):
    """What a kernel is compiled for or branches on: a result holds for all calls that share it."""

    device: str
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    group: int  # query heads that share a key head
    window: bool
    softcap: bool
    deterministic: bool
    dropout: bool


_results: dict[tuple[str, Signature], str | None] = {}
_sums: dict[tuple[str, Signature], bool] = {}


def _signature_of(spec: CallSpec) -> Signature:
    return Signature(
        spec.device,
        spec.dtype,
        spec.head_dim,
        spec.value_dim,
        spec.query_heads // spec.key_heads,
        spec.window,
        bool(spec.softcap),
        spec.deterministic,
        bool(spec.dropout_p),
    )


def failure(backend: Backend, spec: CallSpec) -> str | None:
    """Why the backend is wrong for the signature of `spec`, or None. Computed once in a process and kept."""
    if backend.name == "reference":
        return None
    return _kept_result(_results, _run, backend, spec)


def adds(backend: Backend, spec: CallSpec) -> bool:
    """Whether the backend declares that it adds gradients to sums, and does it right for the signature of `spec`."""
    if not backend.capability.adds or backend.name == "reference":
        return backend.capability.adds
    return _kept_result(_sums, _adds_right, backend, spec)


def _kept_result(
    results: dict[tuple[str, Signature], T], test: Callable[[Backend, Signature], T], backend: Backend, spec: CallSpec
) -> T:
    """What a test found, run once: whatever the caller's random state is, it stays."""
    signature = _signature_of(spec)
    key = backend.name, signature

    def without_gradients() -> T:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return test(backend, signature)

    if key not in results:
        results[key] = in_a_thread(without_gradients)
    return results[key]


def forget() -> None:
    """Test every signature anew, after a backend was installed or repaired."""
    _results.clear()
    _sums.clear()


def _run(backend: Backend, signature: Signature) -> str | None:
    for call in _calls_of_bands(signature.window):
        try:
            errors = _errors_of_call(backend, signature, call)
        except Exception as error:  # whatever a kernel or its compiler raises
            return f"failed its self-test: {type(error).__name__}: {str(error)[:200]}"
        wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE[signature.dtype]}
        if wrong:
            told = ", ".join(f"{name} {error:.2g}" for name, error in wrong.items())
            return f"is wrong at head dims {signature.head_dim}/{signature.value_dim} (relative error of {told})"
    return None


def _calls_of_bands(window: bool) -> list[Call]:
    """One call per kind of band that plans contain."""
    blocks, q, k = [], 0, 0
    for queries, keys in LENGTHS:
        blocks.append(Block((q, q + queries), (k, k + keys)))
        q, k = q + queries, k + keys
    bands = [(-1, 0), (-1, -1)] + ([(37, 0), (20, 9)] if window else [])
    return [Call(tuple(blocks), *band) for band in bands]


def _errors_of_call(backend: Backend, signature: Signature, call: Call) -> dict[str, float]:
    """Relative errors of out, lse and gradients against the reference in float64."""
    tensors = _drawn_tensors(signature, call)
    options = _options_of(signature, call)
    expected = _both_ways(Reference(), [x.double() for x in tensors], call, replace(options, deterministic=False))
    got = _both_ways(backend, tensors, call, options)
    return {name: _relative_error(got[name], x) for name, x in expected.items()}


def _sum_of_rows(x: Tensor, fresh: bool) -> Sum:
    """A sum of all rows of a gradient but some of the first and last. It holds ones, or NaN where it is fresh and must
    not be read."""
    rows = 5, len(x) - 3
    return Sum(rows, torch.full_like(x[slice(*rows)], nan if fresh else 1.0, dtype=torch.float32), fresh)


def _options_of(signature: Signature, call: Call) -> Options:
    softcap = 1.5 if signature.softcap else 0.0
    return Options(signature.head_dim**-0.5, softcap, signature.deterministic, _dropout_of(signature, call))


def _dropout_of(signature: Signature, call: Call) -> Dropout | None:
    """Dropout of rows and heads far inside of a stream: a kernel that counts from the call's own first row differs."""
    if not signature.dropout:
        return None
    q_index, k_index = (torch.arange(*rows, device=signature.device) + 10_000_019 for rows in (call.q, call.k))
    return Dropout(0.3, 7, q_index, k_index, first_head=3)


def _adds_right(backend: Backend, signature: Signature) -> bool:
    """Whether gradients that are added to sums are those that are written, within half of the tolerance. If not, or if
    the kernel fails, parts are rounded before they are added, which is right too."""
    try:
        return all(_added_right(backend, signature, call) for call in _calls_of_bands(signature.window))
    except Exception:  # whatever a kernel or its compiler raises
        return False


def _added_right(backend: Backend, signature: Signature, call: Call) -> bool:
    q, k, v, dout = _drawn_tensors(signature, call)
    options = _options_of(signature, call)
    out = torch.empty_like(dout)
    lse = backend.forward(q, k, v, call, options, out)
    written = Grads(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
    backend.backward(dout, SavedCall(q, k, v, out, lse, call, options), written)
    for fresh in (False, True):
        sums = _sum_of_rows(q, fresh), _sum_of_rows(k, fresh), _sum_of_rows(v, fresh)
        got = Grads(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), sums)
        backend.backward(dout, SavedCall(q, k, v, out, lse, call, options), got)
        for target, total, right in zip(got.tensors, sums, written.tensors, strict=True):
            whole = target.float()
            whole[slice(*total.rows)] = total.wide if fresh else total.wide - 1.0
            if not _relative_error(whole, right.double()) <= TOLERANCE[signature.dtype] / 2:
                return False
    return True


def _drawn_tensors(signature: Signature, call: Call) -> list[Tensor]:
    """q, k, v and dout with two key heads, drawn on the CPU so that every device gets the same numbers."""
    generator = torch.Generator().manual_seed(0)
    rows, keys, heads = call.q[1], call.k[1], 2 * signature.group
    shapes = [
        (rows, heads, signature.head_dim),
        (keys, 2, signature.head_dim),
        (keys, 2, signature.value_dim),
        (rows, heads, signature.value_dim),
    ]
    drawn = [torch.randn(shape, generator=generator, device="cpu") for shape in shapes]
    drawn[0] *= SHARP
    return [x.to(signature.device, signature.dtype) for x in drawn]


def _both_ways(backend: Backend, tensors: list[Tensor], call: Call, options: Options) -> dict[str, Tensor]:
    q, k, v, dout = tensors
    out = torch.empty_like(dout)
    lse = backend.forward(q, k, v, call, options, out)
    grads = Grads(torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    backend.backward(dout, SavedCall(q, k, v, out, lse, call, options), grads)
    return {"out": out, "lse": lse, "dq": grads.dq, "dk": grads.dk, "dv": grads.dv}


def _relative_error(x: Tensor, reference: Tensor) -> float:
    return ((x.double() - reference).norm() / reference.norm()).item()
