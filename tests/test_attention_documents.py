"""Documents of the front door keep to themselves, however their ends are given."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringattn import Documents, Layout, Mask, MeshShape, parallel_attention
from tests.small_tensors import tensors

RUNS = st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=6)


@given(runs=RUNS, causal=st.booleans())
def test_segment_ids_and_negative_ones_are_padding(runs: list[tuple[int, bool]], causal: bool) -> None:
    """Against a mask made of the ids themselves."""
    ids = torch.tensor([-1 if pad else number for number, (size, pad) in enumerate(runs) for _ in range(size)])
    x = [y.requires_grad_() for y in tensors(tokens=len(ids))]
    layout = Layout(Documents.from_segment_ids(ids), MeshShape())
    local = [layout.shard(y) for y in x]
    out = layout.unshard(parallel_attention(*local, layout, mask=Mask(causal=causal), backend="reference"))
    grads = torch.autograd.grad(out.sin().sum(), x)
    allowed = (ids[:, None] == ids[None, :]) & (ids[:, None] >= 0)
    allowed &= torch.ones_like(allowed).tril() if causal else True
    q, k, v = (y.detach().clone().requires_grad_() for y in x)
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * 8**-0.5
    scores = scores.masked_fill(~allowed, -1e30)
    weights = scores.softmax(-1) * allowed.any(-1)[:, None]
    expected = torch.einsum("hqk,khv->qhv", weights, v.repeat_interleave(2, 1))
    wanted = torch.autograd.grad(expected.sin().sum(), (q, k, v))
    for got, reference in zip((out, *grads), (expected, *wanted), strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-12, atol=1e-12)
        assert (got[ids < 0] == 0).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_cumulative_lengths_need_no_mask(backend: str) -> None:
    """Each document alone, bit by bit."""
    q, k, v = tensors()
    docs = Documents.from_cu_seqlens(torch.tensor([0, 5, 5, 12, 20], dtype=torch.int32))
    together = parallel_attention(q, k, v, Layout(docs, MeshShape()), backend=backend)
    for start, size in zip(docs.starts, docs.lengths, strict=True):
        rows = slice(start, start + size)
        alone = Layout(Documents([size]), MeshShape())
        assert torch.equal(together[rows], parallel_attention(q[rows], k[rows], v[rows], alone, backend=backend))
