"""The front door refuses wrong arguments with one clear error, before any communication."""

import copy
from pathlib import Path

import pytest
import torch

from ringattn import Documents, Layout, MeshShape, ParallelAttention, init_mesh, parallel_attention
from ringattn.kernels.registry import choose, explain
from ringattn.kernels.spec import CallSpec
from ringattn.parallel.mesh.shape import resolve_mesh
from tests.parallel.ranks import mesh_of
from tests.pool import Pools


def tensors(tokens: int = 20, heads: int = 4, key_heads: int = 2, dim: int = 8) -> list[torch.Tensor]:
    return [torch.randn(tokens, h, dim) for h in (heads, key_heads, key_heads)]


LAYOUT = Layout(Documents([12, 8]), MeshShape())
BAD = {
    "batch dim": (lambda q, k, v: (q[None], k, v), {}, ["q must be", "(1, 20, 4, 8)"]),
    "tokens": (lambda q, k, v: (q[:19], k, v), {}, ["q must hold the 20 tokens", "got 19"]),
    "other layout": (lambda q, k, v: (q, k[:7], v), {}, ["k must hold the 20 tokens", "got 7"]),
    "dtype": (lambda q, k, v: (q, k.double(), v), {}, ["dtype", "torch.float64"]),
    "integers": (lambda q, k, v: (q.long(), k.long(), v.long()), {}, ["floating", "torch.int64"]),
    "device": (lambda q, k, v: (q, k.to("meta"), v), {}, ["one device", "meta"]),
    "head dim": (lambda q, k, v: (q, k[..., :4], v), {}, ["k must have the head dim of q, 8, got 4"]),
    "value heads": (lambda q, k, v: (q, k, v[:, :1]), {}, ["v must have as many heads as k, 2, got 1"]),
    "groups": (lambda q, k, v: (q[:, :3], k, v), {}, ["multiple of the key heads, got 3 and 2"]),
    "no heads": (lambda q, k, v: (q[:, :0], k, v), {}, ["multiple of the key heads, got 0 and 2"]),
    "dropout": (lambda q, k, v: (q, k, v), {"dropout_p": 1.5}, ["dropout_p must be in [0, 1), got 1.5"]),
    "dropout seed": (lambda q, k, v: (q, k, v), {"dropout_p": 0.5}, ["dropout_seed must be", "dropout_p=0.5", "None"]),
    "softcap": (lambda q, k, v: (q, k, v), {"softcap": -1.0}, ["softcap must be >= 0", "-1.0"]),
    "softcap nan": (lambda q, k, v: (q, k, v), {"softcap": float("nan")}, ["softcap must be >= 0", "nan"]),
    "sinks": (lambda q, k, v: (q, k, v), {"sinks": torch.zeros(2)}, ["sinks must be", "(4,)", "(2,)"]),
    "mask": (lambda q, k, v: (q, k, v), {"mask": "causal"}, ["mask must be a Mask, got str"]),
    "backend": (lambda q, k, v: (q, k, v), {"backend": "fa9"}, ["backend must be", "'fa9'"]),
    "scheme": (lambda q, k, v: (q, k, v), {"scheme": "star"}, ["scheme must be", "'star'"]),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments_are_named_with_what_came(name: str) -> None:
    change, options, words = BAD[name]
    with pytest.raises(ValueError, match=r"\w") as error:
        parallel_attention(*change(*tensors()), LAYOUT, **options)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_layout_without_processes_cannot_communicate() -> None:
    with pytest.raises(ValueError, match="MeshShape, for planning only"):
        parallel_attention(*tensors(10), Layout(Documents([12, 8]), MeshShape(1, 2)))


def test_nan_is_not_hidden() -> None:
    q, k, v = tensors()
    v[3] = float("nan")
    out = parallel_attention(q, k, v, LAYOUT)
    assert out[3:12].isnan().all()
    assert not out[12:].isnan().any()


def test_auto_takes_the_first_backend_that_can() -> None:
    spec = CallSpec("cpu", torch.float32, 8, 8, 4, 2)
    assert choose(spec).name == "cpu"
    assert choose(CallSpec("cpu", torch.float32, 8, 4, 4, 2)).name == "reference"
    reasons = explain(spec)
    assert reasons["cpu"] is None
    assert "cuda tensors only" in (reasons["fa4"] or "")


def wrong_on_every_rank(kind: str) -> None:
    mesh = mesh_of(2, 1)
    layout = Layout(Documents([12, 8]), mesh)
    q, k, v = (layout.shard(x) for x in tensors())
    if kind == "mesh":
        ParallelAttention(mesh_of(1, 2))(q, k, v, layout)
    elif kind == "global":
        parallel_attention(*tensors(), layout)
    elif kind == "degrees":
        init_mesh(ring=3)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("mesh", "layout was made for"), ("global", "shard it with layout.shard"), ("degrees", "world size 2, got")],
)
def test_errors_in_processes_do_not_hang(pool: Pools, kind: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pool(2).run(wrong_on_every_rank, kind, timeout=20)
    assert pool(2).run(int) == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"world_size": 8, "ring": 3}, ["world size 8", "ring=3", "data=?", "product 3"]),
        ({"world_size": 6, "ulysses": 4}, ["world size 6", "ulysses=4", "ring=?"]),
        ({"world_size": 8, "data": 2, "ring": 2, "ulysses": 4}, ["world size 8", "product 16"]),
        ({"world_size": 8, "ulysses": 0}, ["ulysses must be an integer >= 1", "0"]),
        ({"world_size": 16, "ulysses": 16, "ranks_per_node": 8}, ["ulysses=16", "nodes of 8", "world size 16"]),
    ],
)
def test_degrees_that_do_not_fit_are_refused_with_their_product(arguments: dict, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"\w") as error:
        resolve_mesh(**arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_omitted_degrees_are_filled_in() -> None:
    def sizes(*args: object, **kwargs: object) -> tuple[int, int, int]:
        shape = resolve_mesh(*args, **kwargs)  # type: ignore[arg-type]
        return shape.data, shape.ring, shape.ulysses

    assert sizes(8) == (1, 8, 1)
    assert sizes(8, ulysses=4) == (1, 2, 4)
    assert sizes(8, ring=2) == (4, 2, 1)
    assert sizes(8, ring=1, ulysses=2) == (4, 1, 2)
    assert sizes(16, ulysses=16, ranks_per_node=8, ulysses_across_nodes=True) == (1, 1, 16)


def test_a_head_may_be_without_a_sink_and_padding_sees_only_its_sink() -> None:
    layout = Layout(Documents([12], total=20), MeshShape())
    q, k, v = (x.requires_grad_() for x in tensors())
    sinks = torch.tensor([float("-inf"), 0.5, 0.0, 1.0], requires_grad=True)
    out, lse = parallel_attention(q, k, v, layout, sinks=sinks, return_lse=True)
    out.sum().backward()
    assert (out[12:] == 0).all()
    assert lse[0, 12:].eq(float("-inf")).all()
    assert lse[1, 12:].eq(0.5).all()
    assert sinks.grad is not None
    assert sinks.grad[0] == 0
    assert (sinks.grad[1:] != 0).all()
    plain = parallel_attention(q, k, v, layout)
    torch.testing.assert_close(out[:, 0], plain[:, 0])


def test_double_backward_is_refused() -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    out = parallel_attention(q, k, v, LAYOUT, backend="reference")
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_autocast_casts_before_the_kernel() -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    with torch.autocast("cpu", torch.bfloat16):
        out = parallel_attention(q, k.bfloat16(), v, LAYOUT)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


def a_module(mesh: object) -> tuple[str, list[str], bool]:
    attn = ParallelAttention(mesh_of(1, 1), scheme="ring", wide_reduce=False, sinks=torch.zeros(4))
    return repr(attn), list(attn.state_dict()), copy.deepcopy(attn).mesh is attn.mesh


def test_the_module_shows_its_options_and_keeps_its_sinks(pool: Pools) -> None:
    text, state, copied = pool(1).run(a_module, None)[0]
    assert "wide_reduce=False" in text
    assert "scheme=ring" in text
    assert "keep_keys" not in text
    assert state == ["sinks"]
    assert copied


def test_autotune_measures_and_stores(monkeypatch: pytest.MonkeyPatch, fresh_caches: None, tmp_path: Path) -> None:
    monkeypatch.setenv("RINGATTN_AUTOTUNE", "on")
    monkeypatch.setenv("RINGATTN_CACHE_DIR", str(tmp_path))
    layout = Layout(Documents([12, 8]), MeshShape())
    x = tensors()
    out = parallel_attention(*x, layout)
    torch.testing.assert_close(out, parallel_attention(*x, layout, backend="reference"), rtol=1e-5, atol=1e-5)
    assert "backend" in "".join(path.read_text() for path in tmp_path.rglob("*.json"))


def test_misspelt_environment_variables_are_told(monkeypatch: pytest.MonkeyPatch, fresh_caches: None) -> None:
    monkeypatch.setenv("RINGATTN_BACKENDD", "cpu")
    with pytest.warns(UserWarning, match="RINGATTN_BACKENDD"):
        parallel_attention(*tensors(), LAYOUT)
