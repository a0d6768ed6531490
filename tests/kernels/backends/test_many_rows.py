"""Tensors with more numbers than an int32 can count, on every kernel: the last rows are what they are by themselves."""

from collections.abc import Iterator

import pytest
import torch

from ringattn.kernels.registry import backends, builtin, refusal
from ringattn.kernels.spec import Backend, Block, Call, CallSpec, Options
from tests.kernels.backends.test_conformance import both_ways

DIM, LENGTH = 128, 1000
OPTIONS = Options(DIM**-0.5)
NAMES = [backend.name for backend in builtin() if "cuda" in backend.capability.devices]
pytestmark = pytest.mark.gpu


def usable(name: str, heads: tuple[int, int]) -> Backend:
    """The backend, or a skipped test."""
    backend = backends()[name]
    reason = backend.missing() or refusal(backend, CallSpec("cuda", torch.bfloat16, DIM, DIM, *heads))
    if reason is not None:
        pytest.skip(f"{name} {reason}")
    torch.cuda.empty_cache()  # what torch keeps of the test before is free too
    if torch.cuda.mem_get_info()[0] < 100 * 2**30:
        pytest.skip("needs 100 GiB of GPU memory")
    return backend


def documents(count: int, first: int = 0) -> Call:
    """A causal call of documents of one length."""
    rows = [(first + number * LENGTH, first + (number + 1) * LENGTH) for number in range(count)]
    return Call(tuple(Block(one, one, -1, 0) for one in rows), -1, 0)


def rows_of(results: dict[str, torch.Tensor], rows: slice) -> dict[str, torch.Tensor]:
    return {name: one[:, rows] if name == "lse" else one[rows] for name, one in results.items()}


def assert_alike(results: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert results.keys() == right.keys()
    for name, expected in right.items():
        found = results[name]
        error = (found.float() - expected.float()).norm() / expected.float().norm()
        assert error <= 2e-3, (name, float(error))


@pytest.mark.parametrize("heads", [(32, 8), (8, 8)])
@pytest.mark.parametrize("name", NAMES)
def test_many_tokens(name: str, heads: tuple[int, int]) -> None:
    """So many that queries, or keys as well, are more than 2^31 numbers: the last document as by itself."""
    backend, count = usable(name, heads), 2**31 // (heads[0] * DIM * LENGTH) + 3
    shapes = {"q": heads[0], "k": heads[1], "v": heads[1], "dout": heads[0]}
    generator = torch.Generator("cuda").manual_seed(0)
    x = {key: torch.empty(count * LENGTH, n, DIM, dtype=torch.bfloat16, device="cuda") for key, n in shapes.items()}
    for tensor in x.values():
        tensor.normal_(generator=generator)
    assert x["q"].numel() > 2**31
    whole = both_ways(backend, x, documents(count), OPTIONS)
    for first in (0, (count - 1) * LENGTH):
        rows = slice(first, first + LENGTH)
        alone = both_ways(backend, {key: tensor[rows].clone() for key, tensor in x.items()}, documents(1), OPTIONS)
        assert_alike(rows_of(whole, rows), alone)


def far_apart(rows: int, heads: int, stride: int) -> torch.Tensor:
    """(rows, heads, DIM), each row so many numbers behind the one before."""
    return torch.empty(rows, stride, dtype=torch.bfloat16, device="cuda")[:, : heads * DIM].view(rows, heads, DIM)


@pytest.fixture
def wide() -> Iterator[int]:
    """Numbers from row to row, with which few rows are far away."""
    yield 65_536
    torch.cuda.empty_cache()


@pytest.mark.parametrize("name", NAMES)
def test_one_document_whose_rows_are_far_apart(name: str, wide: int) -> None:
    """As heads of a fused projection are: one long document, whose last rows lie beyond 2^31 numbers."""
    heads, rows = (2, 1), 2**31 // 65_536 + 500
    backend = usable(name, heads)
    shapes = {"q": heads[0], "k": heads[1], "v": heads[1], "dout": heads[0]}
    x = {key: far_apart(rows, n, wide).normal_() for key, n in shapes.items()}
    call = Call((Block((0, rows), (0, rows), -1, 0),), -1, 0)
    found = both_ways(backend, x, call, OPTIONS)
    expected = both_ways(backend, {key: tensor.contiguous() for key, tensor in x.items()}, call, OPTIONS)
    last = slice(rows - 1000, rows)
    assert_alike(rows_of(found, last), rows_of(expected, last))
    assert_alike(found, expected)
