"""Gradients added to sums inside of flash-attn-4's backward pass: against a fake of it, in Triton's interpreter."""

from itertools import pairwise

import pytest
import torch

from ringattn.kernels.backends import fa4_sums
from ringattn.kernels.backends.fa4_sums import backward_into
from ringattn.kernels.backends.reference import Reference
from ringattn.kernels.spec import Block, Call, Grads, Options, SavedCall, Sum
from tests.kernels.backends import fake_fa4
from tests.kernels.interpreter import interpreted, run_interpreted, starts_the_interpreter

SCALE = 0.3
Q, K = [0, 40, 41, 41, 80], [0, 40, 60, 90, 131]  # sequences; the second has keys that are not used, the third no query
USED = [40, 12, 30, 41]


def case(key_heads: int, dim: int, used: list[int]) -> tuple[tuple[torch.Tensor, ...], Call]:
    """q, k, v, out, dout, lse in bfloat16 of a causal call with so many keys of each sequence."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(Q[-1], 4, dim), (K[-1], key_heads, dim), (K[-1], key_heads, dim), (Q[-1], 4, dim)]
    q, k, v, dout = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    blocks = [Block((Q[b], Q[b + 1]), (K[b], K[b] + used[b])) for b in range(len(used))]
    call = Call(tuple(blocks), -1, 0)
    out = torch.empty_like(q)
    lse = Reference().forward(q, k, v, call, Options(SCALE), out)
    return (q, k, v, out, dout, lse), call


def zeros(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = (torch.full_like(x, 7.0) for x in tensors[:3])
    return q, k, v


@interpreted
@pytest.mark.parametrize(("fresh", "dim"), [(False, 16), (False, 40), (False, 64), (True, 40)])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_interpreted_shared_rows_are_added_and_others_written(fresh: bool, key_heads: int, dim: int) -> None:
    used = [after - before for before, after in pairwise(K)] if fresh else USED
    tensors, call = case(key_heads, dim, used)
    q, k, v, out, dout, lse = tensors
    spans, before = [(0, Q[-1]), (17, 70), (0, 0)], float("nan") if fresh else 2.0
    sums = [
        None if not b else Sum((a, b), torch.full((b - a, *x.shape[1:]), before), fresh)
        for (a, b), x in zip(spans, (q, k, v), strict=True)
    ]
    got = Grads(*zeros(tensors), (sums[0], sums[1], sums[2]))
    lengths = {
        "cu_seqlens_q": torch.tensor(Q, dtype=torch.int32),
        "cu_seqlens_k": torch.tensor(K, dtype=torch.int32),
        "seqused_k": torch.tensor(used, dtype=torch.int32),
    }
    backward_into(fake_fa4, got, tensors, {**lengths, "softmax_scale": SCALE})
    expected = Grads(*(torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v)))
    saved = SavedCall(q.float(), k.float(), v.float(), out.float(), lse, call, Options(SCALE))
    Reference().backward(dout.float(), saved, expected)
    rounded_keys = key_heads == 4  # the kernel itself writes these
    for index, (total, wide, target) in enumerate(zip(sums, expected.tensors, got.tensors, strict=True)):
        read = torch.zeros(len(target), dtype=torch.bool)
        for block in call.blocks:
            read[slice(*(block.k if index else block.q))] = True
        summed = torch.zeros_like(read)
        if total is not None:
            summed[slice(*total.rows)] = True
            precise = 4e-3 if index and rounded_keys else 1e-6
            parts = (total.wide if fresh else total.wide - before)[read[slice(*total.rows)]]
            assert (parts - wide[read & summed]).norm() <= precise * wide[read & summed].norm()
            assert (target[read & summed] == 7.0).all()
        # Triton's interpreter cuts off where the device rounds: one unit in the last place.
        torch.testing.assert_close(target[read & ~summed].float(), wide[read & ~summed], rtol=2**-7, atol=1e-6)
        assert (target[~read] == 7.0).all()


@interpreted
def test_interpreted_another_last_step_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, _ = case(2, 16, USED)
    monkeypatch.setattr(fake_fa4, "_flash_attn_bwd", lambda *_, **__: None)
    q = tensors[0]
    sums = (Sum((0, len(q)), torch.zeros_like(q, dtype=torch.float32)), None, None)
    with pytest.raises(RuntimeError, match="_bwd_postprocess_convert"):
        backward_into(fake_fa4, Grads(*zeros(tensors), sums), tensors, {})
    assert not fa4_sums._of_thread.waiting  # nothing is kept of a call that failed


@starts_the_interpreter
def test_in_the_interpreter() -> None:
    run_interpreted(__file__, 13)
