"""Windows and chunks of the front door, on one device."""

import pytest
import torch
from torch import Tensor

from ringattn import Documents, Mask, parallel_attention
from tests.small_tensors import DOCS, LAYOUT, dense, tensors


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_one_token_is_the_value_itself(backend: str) -> None:
    q, k, v = tensors()
    out = parallel_attention(q, k, v, LAYOUT, sliding_window=1, backend=backend)
    torch.testing.assert_close(out, v.repeat_interleave(2, 1), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("window", [1, 2, 5])
def test_the_gradient_ends_at_the_window(backend: str, window: int) -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    query = 10
    parallel_attention(q, k, v, LAYOUT, sliding_window=window, backend=backend)[query].square().sum().backward()
    inside = torch.zeros(20, dtype=torch.bool)
    inside[query - window + 1 : query + 1] = True
    for grad in (k.grad, v.grad):
        assert grad is not None
        assert (grad[~inside] == 0).all()
        if window > 1 or grad is v.grad:  # of one key the probability is 1 whatever its score is
            assert (grad[inside].abs().amax((1, 2)) > 1e-6).all()


def by_chunks(docs: Documents, chunk: int) -> Tensor:
    """Pairs of one document and one chunk of it, causal."""
    place = torch.cat([torch.arange(length) for length in docs.lengths])
    return docs.dense(Mask()) & (place[:, None] // chunk == place[None, :] // chunk)


def test_a_chunk_is_attended_alone_and_starts_with_its_document() -> None:
    got = parallel_attention(*tensors(), LAYOUT, mask=Mask(chunk=8))
    expected = dense(by_chunks(DOCS, 8))[0]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    ignored = parallel_attention(*tensors(), LAYOUT)
    assert (ignored - expected).abs().max() > 0.1
