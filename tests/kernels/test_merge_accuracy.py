"""A softmax that was computed in parts is as accurate as one that was not."""

import math

import torch

from ringattn.kernels import registry
from ringattn.kernels.backends.reference import Reference
from ringattn.kernels.merge import merge_
from ringattn.kernels.spec import Block, Call, Grads, Options, SavedCall
from tests.dense import relative_error


def merged_error(parts: int) -> dict[str, float]:
    """Errors of a bfloat16 kernel whose keys come in parts, against float64."""
    generator = torch.Generator().manual_seed(0)
    rows, heads, dim = 256, 2, 64
    q, k, v, dout = (torch.randn(rows, heads, dim, generator=generator).bfloat16() for _ in range(4))
    whole, options = Call((Block((0, rows), (0, rows)),)), Options(dim**-0.5)
    backend, judge = registry.backends()["cpu"], Reference()
    wide = [x.double() for x in (q, k, v, dout)]
    expected_out = torch.empty_like(wide[0])
    expected_lse = judge.forward(*wide[:3], whole, options, expected_out)
    expected = Grads(*(torch.empty_like(x) for x in wide[:3]))
    judge.backward(wide[3], SavedCall(*wide[:3], expected_out, expected_lse, whole, options), expected)
    size = rows // parts
    call = Call((Block((0, rows), (0, size)),))
    out, lse = torch.zeros(rows, heads, dim), torch.full((heads, rows), -math.inf)
    for start in range(0, rows, size):
        keys, part = slice(start, start + size), torch.empty_like(q)
        part_lse = backend.forward(q, k[keys], v[keys], call, options, part)
        assert part_lse.dtype == torch.float32
        merge_(out, lse, part, part_lse)
    grads = Grads(torch.zeros(rows, heads, dim), torch.empty_like(k), torch.empty_like(v))
    for start in range(0, rows, size):
        keys, dq = slice(start, start + size), torch.empty_like(q)
        target = Grads(dq, grads.dk[keys], grads.dv[keys])
        saved = SavedCall(q, k[keys], v[keys], out.bfloat16(), lse, call, options)
        backend.backward(dout, saved, target)
        grads.dq.add_(dq)
    got = {"out": out.bfloat16(), "lse": lse, "dq": grads.dq, "dk": grads.dk, "dv": grads.dv}
    return {
        name: relative_error(got[name], x) for name, x in zip(got, (expected_out, expected_lse, *expected), strict=True)
    }


def test_errors_do_not_grow_with_the_parts() -> None:
    """Out and lse are accumulated in float32: 1.5 times the error of a single pass at most."""
    single = merged_error(1)
    for parts in (4, 16):
        errors = merged_error(parts)
        assert errors.pop("lse") < 1e-5  # of float32; through bfloat16 it would be 1e-3
        for name, error in errors.items():
            assert error <= 1.5 * single[name], (parts, name)
