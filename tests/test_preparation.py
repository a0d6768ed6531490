"""What is settled for a call is kept with its layout, for calls of the same kind and for no other."""

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from ringattn import Documents, Layout, Mask, MeshShape, parallel_attention, preparation
from ringattn.parallel.execution.job import Job
from ringattn.preparation import prepare
from ringattn.settings import AttentionOptions


def tensors(tokens: int = 20, heads: int = 4, key_heads: int = 2, dim: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, h, dim, generator=generator) for h in (heads, key_heads, key_heads)]


@pytest.fixture
def layout(monkeypatch: pytest.MonkeyPatch) -> Layout:
    """A new one, with an answer for `tensors()`."""
    for name in ("RINGATTN_BACKEND", "RINGATTN_AUTOTUNE", "RINGATTN_DETERMINISTIC"):
        monkeypatch.delenv(name, raising=False)
    made = Layout(Documents([12, 8]), MeshShape())
    parallel_attention(*tensors(), made)
    return made


def settled(layout: Layout, x: list[torch.Tensor] | None = None, **keywords: Any) -> Job:
    q, k, v = tensors() if x is None else x
    (job,) = prepare(q, k, v, None, layout, AttentionOptions(**keywords))
    return job


def test_equal_calls_are_settled_once(monkeypatch: pytest.MonkeyPatch, layout: Layout) -> None:
    first = settled(layout)

    def again(*_: Any) -> None:
        raise AssertionError("settled again")

    monkeypatch.setattr(preparation, "_settle", again)
    assert settled(layout) is first
    assert settled(layout, mask=Mask(), softcap=0.0) is first


WRONG = {
    "tokens": (lambda q, k, v: (q[:19], k, v), {}, "q must hold the 20 tokens"),
    "key tokens": (lambda q, k, v: (q, k[:7], v), {}, "k must hold the 20 tokens"),
    "value tokens": (lambda q, k, v: (q, k, v[:7]), {}, "v must hold the 20 tokens"),
    "batch dim": (lambda q, k, v: (q[None], k, v), {}, "q must be a tensor of shape"),
    "no tensor": (lambda q, k, v: (q, k.numpy(), v), {}, "k must be a tensor of shape"),
    "key dtype": (lambda q, k, v: (q, k.double(), v), {}, "share one floating dtype"),
    "value dtype": (lambda q, k, v: (q, k, v.half()), {}, "share one floating dtype"),
    "device": (lambda q, k, v: (q, k, v.to("meta")), {}, "on one device"),
    "head dim": (lambda q, k, v: (q, k[..., :4], v), {}, "k must have the head dim of q"),
    "heads": (lambda q, k, v: (q[:, :3], k, v), {}, "multiple of the key heads"),
    "value heads": (lambda q, k, v: (q, k, v[:, :1]), {}, "v must have as many heads as k"),
    "sinks": (lambda q, k, v: (q, k, v), {"sinks": torch.zeros(3)}, "sinks must be one logit per query head"),
    "no sinks": (lambda q, k, v: (q, k, v), {"sinks": [0.0] * 4}, "sinks must be a tensor"),
    "mask": (lambda q, k, v: (q, k, v), {"mask": "causal"}, "mask must be a Mask"),
    "list": (lambda q, k, v: (q, k, v), {"scheme": ["ring"]}, "scheme must be one of"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_differs_from_the_kept_call_is_checked(layout: Layout, name: str) -> None:
    change, keywords, words = WRONG[name]
    parallel_attention(*tensors(), layout, sinks=torch.zeros(4))
    with pytest.raises(ValueError, match=words):
        parallel_attention(*change(*tensors()), layout, **keywords)


def test_no_layout_is_still_refused() -> None:
    with pytest.raises(ValueError, match="layout must be a Layout, got dict"):
        parallel_attention(*tensors(), {})  # type: ignore[arg-type]


def test_a_wrong_call_is_refused_every_time(layout: Layout) -> None:
    q, k, v = tensors()
    for _ in range(2):
        with pytest.raises(ValueError, match="q must hold the 20 tokens"):
            parallel_attention(q[:3], k, v, layout)


CHANGES: dict[str, dict[str, Any]] = {
    "mask": {"mask": Mask(window=(3, 0))},
    "scale": {"softmax_scale": 0.9},
    "softcap": {"softcap": 0.5},
    "deterministic": {"deterministic": True},
    "backend": {"backend": "reference"},
    "lse": {"return_lse": True},
    "memory": {"memory_limit": 10**9},
    "chunks": {"head_chunks": 2},
}


@pytest.mark.parametrize("name", CHANGES)
def test_keywords_are_part_of_the_kind(layout: Layout, name: str) -> None:
    assert settled(layout, **CHANGES[name]) is not settled(layout)


def test_shapes_and_dtypes_are_part_of_the_kind(layout: Layout) -> None:
    """Each gets what a layout that has seen no other would give it."""
    kinds = [tensors(), [x.double() for x in tensors()], tensors(heads=6, key_heads=3), tensors(dim=16)]
    for x in [*kinds, *kinds]:
        out = parallel_attention(*x, layout)
        assert out.dtype == x[0].dtype
        assert torch.equal(out, parallel_attention(*x, Layout(Documents([12, 8]), MeshShape())))


@pytest.mark.parametrize("name", ["softmax_scale", "softcap", "dropout_p"])
@pytest.mark.parametrize("value", [torch.tensor(0.3), torch.nn.Parameter(torch.tensor([0.3])), "0.3"])
def test_settings_are_numbers_not_tensors(layout: Layout, name: str, value: Any) -> None:
    """A tensor would be waited for at every call, and would silently get no gradient."""
    q, k, v = tensors()
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{name} must be a number, .* got {type(value).__name__}"):
            parallel_attention(q, k, v, layout, **{name: value})
    number = parallel_attention(q, k, v, layout, softmax_scale=np.float32(0.5))  # type: ignore[arg-type]
    assert torch.equal(number, parallel_attention(q, k, v, layout, softmax_scale=0.5))


def test_the_environment_is_read_at_every_call(monkeypatch: pytest.MonkeyPatch, layout: Layout) -> None:
    assert settled(layout).backend.name == "cpu"
    monkeypatch.setenv("RINGATTN_BACKEND", "reference")
    assert settled(layout).backend.name == "reference"
    monkeypatch.setenv("RINGATTN_BACKEND", "fa9")
    with pytest.raises(ValueError, match="got 'fa9'"):
        parallel_attention(*tensors(), layout)
    monkeypatch.delenv("RINGATTN_BACKEND")
    assert settled(layout).backend.name == "cpu"
    monkeypatch.setenv("RINGATTN_DETERMINISTIC", "on")
    assert settled(layout).options.deterministic
    monkeypatch.setenv("RINGATTN_AUTOTUNE", "maybe")
    with pytest.raises(ValueError, match="RINGATTN_AUTOTUNE must be one of"):
        parallel_attention(*tensors(), layout)


def test_a_dropout_seed_is_of_its_call(layout: Layout) -> None:
    q, k, v = tensors()

    def dropped(seed: Any) -> torch.Tensor:
        return parallel_attention(q, k, v, layout, dropout_p=0.5, dropout_seed=seed)

    first, second, again = dropped(1), dropped(2), dropped(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    kept = len(layout._kept)
    dropped(3)
    assert len(layout._kept) == kept, "one answer serves all seeds"
    for seed in (None, -1, 1.5):
        with pytest.raises(ValueError, match="dropout_seed must be an integer >= 0"):
            dropped(seed)


def test_what_is_kept_dies_with_the_layout(layout: Layout) -> None:
    own = Layout(Documents([12, 8]), MeshShape())
    job, died = weakref.ref(settled(own)), weakref.ref(own)
    gc.disable()  # nothing that is kept may hold the layout
    try:
        del own
        assert died() is None
        assert job() is None
    finally:
        gc.enable()


def test_a_scale_that_is_no_number_is_refused(layout: Layout) -> None:
    q, k, v = tensors()
    with pytest.raises(ValueError, match="softmax_scale must be a number, got nan"):
        parallel_attention(q, k, v, layout, softmax_scale=float("nan"))
