"""What a call knows of itself, against the definition of its band."""

import itertools

import pytest
import torch

from ringattn.kernels.backends.reference import Reference
from ringattn.kernels.spec import Block, Call, Options


@pytest.mark.parametrize("band", [(-1, -1), (-1, 0), (2, 0), (0, 0), (1, 2), (-1, 1)])
def test_keyless_rows_are_those_whose_softmax_is_empty(band: tuple[int, int]) -> None:
    for n, m in itertools.product(range(5), repeat=2):
        call = Call((Block((0, 2), (0, 2)), Block((2, 2 + n), (2, 2 + m))), *band)
        q, k = torch.zeros(2 + n, 1, 4), torch.zeros(2 + m, 1, 4)
        lse = Reference().forward(q, k, k, call, Options(1.0), torch.empty_like(q))
        assert call.keyless_rows == bool((lse == float("-inf")).any()), (n, m)
