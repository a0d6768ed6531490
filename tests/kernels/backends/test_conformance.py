"""One suite for every backend that is present: what it declares it does right, what it does not declare is refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringattn import Documents, Layout, Mask, MeshShape, parallel_attention
from ringattn.kernels.backends.reference import Reference
from ringattn.kernels.registry import backends, explain, refusal
from ringattn.kernels.selftest import adds
from ringattn.kernels.spec import Backend, Block, Call, CallSpec, Grads, Options, SavedCall, Sum, accumulation_dtype
from ringattn.parallel.geometry.blocks import Piece, blocks_of, group_calls, join_full

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Of one call against float64. Half-precision kernels round their probabilities too.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
CPU_SUMS = {torch.bfloat16: 2e-2, torch.float16: 5e-3}  # torch's CPU kernel also adds up in half precision
# Per element, for results that are differences of larger numbers.
SLACK = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}
FEATURES: dict[str, dict[str, object]] = {
    "plain": {},
    "window": {"window": True},
    "softcap": {"softcap": 1.3},
    "unequal head dims": {"value_dim": 32},
    "dropout": {"dropout_p": 0.1},
    "deterministic": {"deterministic": True},
}


def present() -> list[tuple[str, str]]:
    """Backends that are installed, with a device on which they could run."""
    pairs = [(name, device) for name, backend in backends().items() for device in DEVICES if backend.missing() is None]
    return [(name, device) for name, device in pairs if device in (backends()[name].capability.devices or DEVICES)]


def spec_of(device: str, dtype: torch.dtype, heads: tuple[int, int] = (4, 2), **changes: object) -> CallSpec:
    spec = CallSpec(device, dtype, 64, 64, *heads)
    return replace(spec, **changes)


@st.composite
def calls(draw: st.DrawFn, window: bool) -> list[Call]:
    """Calls as planners make them: pieces of documents over parts of their keys, with rows between and skipped rows."""
    left = draw(st.sampled_from([-1, 0, 7, 100])) if window else -1
    right = draw(st.sampled_from([-1, 0, 40])) if window else -1
    band = Mask(draw(st.booleans()), (left, right)).band
    blocks, row, key = [], 0, 0
    for document in range(draw(st.integers(1, 4))):
        length = draw(st.one_of(st.integers(1, 300), st.sampled_from([1, 127, 128, 129, 1000, 4097])))
        first = draw(st.integers(0, length - 1))
        last = draw(st.integers(first + 1, min(length, first + 500)))
        key_first = draw(st.integers(0, last - 1))
        key_last = draw(st.integers(key_first + 1, length))
        query, run = Piece(document, first, last, row), Piece(document, key_first, key_last, key)
        blocks += blocks_of(query, [run], band)
        row += last - first + draw(st.sampled_from([0, 0, 3]))
        key += key_last - key_first + draw(st.sampled_from([0, 0, 5]))
    return list(group_calls(join_full(blocks), (0, row)))


def both_ways(backend: Backend, x: dict[str, torch.Tensor], call: Call, options: Options) -> dict[str, torch.Tensor]:
    q, k, v = x["q"][slice(*call.q)], x["k"][slice(*call.k)], x["v"][slice(*call.k)]
    dout = x["dout"][slice(*call.q)]
    out = torch.full_like(dout, 7.0)
    lse = backend.forward(q, k, v, call, options, out)
    grads = Grads(torch.full_like(q, 7.0), torch.full_like(k, 7.0), torch.full_like(v, 7.0))
    backend.backward(dout, SavedCall(q, k, v, out, lse, call, options), grads)
    rows = torch.cat([torch.arange(a - call.k[0], b - call.k[0]) for a, b in call.key_runs]).to(q.device)
    return {"out": out, "lse": lse, "dq": grads.dq, "dk": grads.dk[rows], "dv": grads.dv[rows]}


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("name", "device"), present())
@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_calls_are_right(name: str, device: str, dtype: torch.dtype, window: bool, data: st.DataObject) -> None:
    heads = data.draw(st.sampled_from([(4, 4), (6, 2), (8, 1)]))
    reason = refusal(backends()[name], spec_of(device, dtype, heads, window=window))
    if reason is not None:
        pytest.skip(reason)
    made = data.draw(calls(window))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    rows = max((call.q[1] for call in made), default=1), max((call.k[1] for call in made), default=1)
    shapes = {"q": (rows[0], heads[0]), "k": (rows[1], heads[1]), "v": (rows[1], heads[1]), "dout": (rows[0], heads[0])}
    x = {key: torch.randn(*shape, 64, generator=generator).to(device, dtype) for key, shape in shapes.items()}
    options = Options(64**-0.5)
    for call in made:
        got = both_ways(backends()[name], x, call, options)
        expected = both_ways(Reference(), {key: tensor.double() for key, tensor in x.items()}, call, options)
        for key, reference in expected.items():
            finite = ~reference.isinf()
            assert torch.equal(got[key].isinf(), reference.isinf())
            tolerance = CPU_SUMS.get(dtype, TOLERANCE[dtype]) if name == "cpu" else TOLERANCE[dtype]
            limit = tolerance if key != "lse" else max(TOLERANCE[torch.float32], tolerance * 0.1)
            # What may be 0 is the difference of rounded numbers near 1: an lse of one key, a gradient over few keys, of
            # which a key sums as many as it has queries.
            few = call.max_q if key == "dk" and call.max_k <= 2 else 1
            slack = SLACK[dtype] * (few * int(finite.sum())) ** 0.5 if key in ("lse", "dq", "dk") else 0.0
            error = (got[key].double() - reference)[finite].norm()
            assert error <= limit * reference[finite].norm() + slack, (key, call)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("name", "device"), present())
def test_some_of_the_heads_of_tensors_are_computed_in_place(name: str, device: str, dtype: torch.dtype) -> None:
    """As those of a chunk of heads; the other heads of what is written are left alone."""
    if (reason := refusal(backends()[name], spec_of(device, dtype))) is not None:
        pytest.skip(reason)
    (call,) = group_calls(blocks_of(Piece(0, 0, 200, 0), [Piece(0, 0, 200, 0)], Mask().band), (0, 200))
    generator, options = torch.Generator().manual_seed(1), Options(64**-0.5)

    def wide(heads: int) -> torch.Tensor:
        return torch.randn(200, 2 * heads, 64, generator=generator).to(device, dtype)

    q, k, v, dout = (wide(heads) for heads in (4, 2, 2, 4))
    results: dict[str, list[torch.Tensor]] = {}
    for backend in (backends()[name], Reference()):
        own = (lambda x: x.double()) if isinstance(backend, Reference) else lambda x: x
        written = [own(torch.full_like(x, 7.0)) for x in (q, q, k, v)]
        views = [own(x)[:, x.shape[1] // 2 :] for x in (q, k, v, dout)]
        out, dq, dk, dv = (x[:, x.shape[1] // 2 :] for x in written)
        lse = backend.forward(*views[:3], call, options, out)
        backend.backward(views[3], SavedCall(*views[:3], out, lse, call, options), Grads(dq, dk, dv))
        results[backend.name] = [out, dq, dk, dv]
        assert all((x[:, : x.shape[1] // 2] == 7.0).all() for x in written)
    tolerance = CPU_SUMS.get(dtype, TOLERANCE[dtype]) if name == "cpu" else TOLERANCE[dtype]
    for got, expected in zip(results[name], results["reference"], strict=True):
        assert (got.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("name", "device"), present())
def test_features_are_done_or_refused(name: str, device: str, dtype: torch.dtype, feature: str) -> None:
    """A declared feature changes the result as in float64; another one raises, and names itself."""
    changes = FEATURES[feature]
    spec = spec_of(device, dtype, **changes)
    docs = Documents([90, 1, 33])
    layout = Layout(docs, MeshShape())
    generator = torch.Generator().manual_seed(1)
    dims = {"q": (4, 64), "k": (2, 64), "v": (2, spec.value_dim)}
    x = {key: torch.randn(docs.total, *dim, generator=generator).to(device, dtype) for key, dim in dims.items()}
    mask = Mask(window=(11, 0)) if spec.window else Mask()
    keywords = {"softcap": spec.softcap, "deterministic": spec.deterministic}
    dropout = {"dropout_p": spec.dropout_p, "dropout_seed": 3 if spec.dropout_p else None}
    keywords |= dropout
    if explain(spec)[name] is not None:
        with pytest.raises(NotImplementedError, match=name):
            parallel_attention(*x.values(), layout, mask=mask, backend=name, **keywords)
        return
    got = parallel_attention(*x.values(), layout, mask=mask, backend=name, **keywords)
    wide = [tensor.double() for tensor in x.values()]
    expected = parallel_attention(*wide, layout, mask=mask, backend="reference", softcap=spec.softcap, **dropout)
    assert (got.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    if feature in ("window", "softcap", "dropout"):
        off = parallel_attention(*x.values(), layout, backend=name)
        assert (got - off).norm() > 1e-2 * off.norm()


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("name", "device"), present())
def test_sums_are_of_gradients_that_are_not_rounded(
    name: str, device: str, dtype: torch.dtype, heads: tuple[int, int]
) -> None:
    spec = spec_of(device, dtype, heads)
    backend = backends()[name]
    if not backend.capability.adds or refusal(backend, spec):
        pytest.skip("adds no gradients to sums")
    assert adds(backend, spec)
    call = Call((Block((0, 300), (0, 300)), Block((300, 340), (310, 600))), -1, 0)  # keys between that nobody reads
    generator = torch.Generator().manual_seed(1)
    shapes = (340, heads[0]), (600, heads[1]), (600, heads[1]), (340, heads[0])
    q, k, v, dout = (torch.randn(*shape, 64, generator=generator).to(device, dtype) for shape in shapes)
    options = Options(64**-0.5)
    out = torch.empty_like(q)
    lse = backend.forward(q, k, v, call, options, out)
    exact = Grads(*(torch.zeros_like(x, dtype=torch.float64) for x in (q, k, v)))
    wide = (x.double() for x in (q, k, v, out, lse))
    Reference().backward(dout.double(), SavedCall(*wide, call, options), exact)
    written = Grads(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
    backend.backward(dout, SavedCall(q, k, v, out, lse, call, options), written)
    sums = [Sum((0, len(x)), torch.zeros_like(x, dtype=accumulation_dtype(dtype))) for x in (q, k, v)]
    untouched = Grads(*(torch.full_like(x, 7.0) for x in (q, k, v)), (sums[0], sums[1], sums[2]))
    backend.backward(dout, SavedCall(q, k, v, out, lse, call, options), untouched)
    for index, reference in enumerate(exact.tensors):
        assert (untouched.tensors[index] == 7.0).all()
        error, rounded = (
            float((x.double() - reference).norm() / reference.norm())
            for x in (sums[index].wide, written.tensors[index])
        )
        narrow = dtype in (torch.bfloat16, torch.float16)
        kernel_rounds = name == "fa4" and index and heads[0] == heads[1]
        assert error <= (rounded * 0.9 if narrow and not kernel_rounds else rounded + 1e-12)


@pytest.mark.parametrize(("name", "device"), present())
def test_gradients_of_two_runs_are_equal_where_deterministic(name: str, device: str) -> None:
    dtype = (backends()[name].capability.dtypes or DTYPES)[-1]
    spec = spec_of(device, dtype, deterministic=True)
    if not backends()[name].capability.deterministic or refusal(backends()[name], spec):
        pytest.skip("does not declare it")
    layout = Layout(Documents([1500, 600]), MeshShape())
    x = [torch.randn(2100, heads, 64, device=device, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]
    runs = []
    for _ in range(2):
        out = parallel_attention(*x, layout, backend=name, deterministic=True)
        runs.append(torch.autograd.grad(out, x, torch.ones_like(out)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
