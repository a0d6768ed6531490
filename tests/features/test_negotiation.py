"""FEATURES A.2: names and features are taken exactly or refused, never dropped."""

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringattn import Documents, Layout, Mask, MeshShape, ParallelAttention, parallel_attention
from ringattn.kernels import registry
from ringattn.kernels.backends import fa3
from ringattn.kernels.spec import Backend, CallSpec
from ringattn.names import ALIASES, canonical
from tests.hf import one_layer as hf
from tests.kernels.backends import fakes
from tests.kernels.backends.test_packages import LENGTHS, Operators, check, make_call
from tests.pool import Pools

NAMES = tuple(inspect.signature(parallel_attention).parameters)
PAIRS = [(name, alias) for name, aliases in ALIASES.items() for alias in aliases]
LAYOUT = Layout(Documents([12, 8]), MeshShape())
bounds = st.integers(-1, 9000)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No choice of a backend is left to the next test."""
    registry._chosen.cache_clear()
    yield
    registry._chosen.cache_clear()


def tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(20, heads, 8, generator=generator) for heads in (4, 2, 2)]


@pytest.mark.parametrize("names", [("out", "is_causal"), ("out_", "causal")])
@pytest.mark.parametrize("softcap", [True, False])
def test_row_12_a_build_gets_the_arguments_that_it_has(names: tuple[str, str], softcap: bool) -> None:
    """Under its own names; a feature that it has no argument for is refused, and the argument is never passed."""
    record: fakes.Record = []
    call = make_call(LENGTHS["dense"], (-1, 0))
    with Operators(record, *names, softcap=softcap):
        check(fa3.FlashAttention3(), call)
        assert all(("softcap" in launch) == softcap for launch in record)
        assert names[0] in record[0]
        assert all(names[1] in launch for launch in record)
        if softcap:
            check(fa3.FlashAttention3(), call, softcap=1.5)
        else:
            with pytest.raises(NotImplementedError, match="no softcap"):
                check(fa3.FlashAttention3(), call, softcap=1.5)


@given(pair=st.sampled_from(PAIRS), value=st.one_of(st.none(), st.floats()), other=st.booleans())
def test_row_13_every_alias_is_canonical(pair: tuple[str, str], value: float | None, other: bool) -> None:
    name, alias = pair
    rest = {"deterministic": other}
    assert canonical({alias: value} | rest, NAMES) == canonical({name: value} | rest, NAMES)
    assert canonical({name: value}, NAMES)[name] is value


@given(pair=st.sampled_from(PAIRS), values=st.tuples(st.floats(), st.floats()), swap=st.booleans())
def test_row_13_two_names_for_one_argument_raise(
    pair: tuple[str, str], values: tuple[float, float], swap: bool
) -> None:
    both = dict(zip(pair[::-1] if swap else pair, values, strict=True))
    with pytest.raises(TypeError) as caught:
        canonical(both, NAMES)
    assert all(repr(name) in str(caught.value) for name in pair)


@given(left=bounds, right=bounds, causal=st.booleans(), name=st.sampled_from(["window", "window_size"]))
def test_row_13_windows_make_a_mask(left: int, right: int, causal: bool, name: str) -> None:
    for pair in ((left, right), [left, right]):
        assert canonical({name: pair, "causal": causal}, NAMES) == {"mask": Mask(causal, (left, right))}
    assert canonical({name: (left, right)}, NAMES) == {"mask": Mask(window=(left, right))}
    assert canonical({"causal": causal, "mask": None}, NAMES) == {"mask": Mask(causal)}


@pytest.mark.parametrize("name", ["causal", "window", "window_size", "sliding_window"])
def test_row_13_a_mask_and_a_part_of_it_raise(name: str) -> None:
    value: Any = {"causal": True, "sliding_window": 4}.get(name, (4, 0))
    with pytest.raises(TypeError, match=rf"'mask' and '{name}'"):
        canonical({"mask": Mask(), name: value}, NAMES)


def test_row_13_two_windows_raise() -> None:
    with pytest.raises(TypeError, match="'window_size' and 'sliding_window'"):
        canonical({"window_size": (3, 0), "sliding_window": 4}, NAMES)


def test_row_13_other_libraries_names_at_the_front_door() -> None:
    q, k, v = tensors()
    expected = parallel_attention(q, k, v, LAYOUT, mask=Mask(window=(4, 0)), softmax_scale=0.3)
    assert torch.equal(expected, parallel_attention(q, k, v, LAYOUT, sliding_window=5, scale=0.3))
    assert torch.equal(expected, parallel_attention(q, k, v, LAYOUT, window_size=(4, 0), scaling=0.3))
    with pytest.raises(TypeError, match="give one"):
        parallel_attention(q, k, v, LAYOUT, softmax_scale=0.3, scale=0.3)


FEATURES: dict[str, dict[str, Any]] = {
    "window": {"window": True},
    "softcap": {"softcap": 1.0},
    "dropout": {"dropout_p": 0.1},
    "unequal head dims": {"value_dim": 32},
}


LACKING = [
    pytest.param(backend, feature, id=f"{backend.name}-{feature}")
    for backend in registry.builtin()
    for feature in FEATURES
    if not getattr(backend.capability, feature.replace(" ", "_"))
]


@pytest.mark.parametrize(("backend", "feature"), LACKING)
def test_row_14_a_feature_that_a_backend_lacks_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, backend: Backend, feature: str
) -> None:
    """Whether it is installed or not. What backends that are present do is compared by the conformance suite."""
    declared = backend.capability
    if declared.compute_capability is not None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: declared.compute_capability[0])
    spec = CallSpec((declared.devices or ("cpu",))[0], (declared.dtypes or (torch.bfloat16,))[0], 64, 64, 4, 2)
    with pytest.raises(NotImplementedError, match=f"backend '{backend.name}' cannot do this call: it has .*{feature}"):
        registry.choose(replace(spec, **FEATURES[feature]), backend.name)


@pytest.mark.parametrize(
    "options",
    [{"dropout_p": 0.1, "dropout_seed": 3, "backend": "cpu"}, {"softcap": 2.0, "backend": "cpu"}, {"backend": "fa4"}],
)
def test_row_14_the_front_door_refuses_too(options: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match=r"dropout|softcap|cuda tensors only"):
        parallel_attention(*tensors(), LAYOUT, **options)


@pytest.mark.parametrize("name", ["segment_ids", "attn_mask", "bias", "alibi_slopes", "block_table", "seqused_k"])
def test_row_14_what_no_argument_stands_for_raises(name: str) -> None:
    keywords: Any = {name: torch.zeros(20)}
    with pytest.raises(TypeError, match=f"unknown argument {name!r}"):
        parallel_attention(*tensors(), LAYOUT, **keywords)


@pytest.mark.parametrize(
    "changes",
    [
        {"mask": Mask(window=(3, 0))},
        {"mask": Mask(causal=False)},
        {"mask": Mask(chunk=5)},
        {"softmax_scale": 0.1},
        {"softcap": 0.5},
        {"sinks": torch.ones(4)},
        {"dropout_p": 0.5, "dropout_seed": 0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_row_14_every_argument_changes_the_result(changes: dict[str, Any]) -> None:
    plain, changed = (parallel_attention(*tensors(), LAYOUT, **options) for options in ({}, changes))
    assert (plain - changed).norm() > 1e-2 * plain.norm()


def test_row_14_deterministic_alone_only_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    """What changes the mathematics is refused, this is told."""
    backend = registry.backends()["cpu"]
    monkeypatch.setattr(backend, "capability", replace(backend.capability, deterministic=False), raising=False)
    registry._chosen.cache_clear()
    with pytest.warns(UserWarning, match="cpu does not promise"):
        assert registry.choose(CallSpec("cpu", torch.float32, 8, 8, 4, 2, deterministic=True)).name == "cpu"


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("sofcap", "softcap"), ("slidingwindow", "sliding_window"), ("leanable_sink", "learnable_sink")],
)
def test_row_15_an_unknown_name_raises_with_the_closest(wrong: str, meant: str) -> None:
    with pytest.raises(TypeError, match=f"{wrong!r}; did you mean {meant!r}"):
        canonical({wrong: 1}, NAMES)


def test_row_15_a_name_like_no_other_raises_with_all() -> None:
    with pytest.raises(TypeError, match=r"known are .*softcap"):
        canonical({"zzz": 1}, NAMES)


def test_row_15_the_front_doors_refuse_a_misspelling() -> None:
    with pytest.raises(TypeError, match="'sofcap'; did you mean 'softcap'"):
        parallel_attention(*tensors(), LAYOUT, sofcap=1)
    with pytest.raises(TypeError, match="sceme"):
        ParallelAttention(None, sceme="ring")


# Of what a model's forward pass hands to every layer.
INERT = "use_cache", "position_ids", "cache_position", "return_dict", "output_hidden_states", "num_items_in_batch"


def interface_takes(keywords: dict[str, Any]) -> torch.Tensor:
    q, k, v = tensors()
    return hf.interface(Documents([12, 8]), (q, k, v), keywords)[0]


def test_row_15_a_layer_of_a_model_takes_inert_names_only(pool: Pools) -> None:
    plain, inert, absent = (
        pool(1).run(interface_takes, keywords)[0]
        for keywords in ({}, dict.fromkeys(INERT, 1), {"sofcap": None, "s_aux": None})
    )
    assert torch.equal(plain, inert)
    assert torch.equal(plain, absent)
    with pytest.raises(TypeError, match="sofcap"):
        pool(1).run(interface_takes, {"sofcap": 1})


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


def test_row_16_softcap_on_torchs_kernel_is_refused(a_gpu: None) -> None:
    """A call is refused for what it asks, whatever the model is called."""
    spec = CallSpec("cuda", torch.bfloat16, 256, 256, 8, 4, softcap=50.0)
    with pytest.raises(NotImplementedError, match="backend 'torch' cannot do this call: it has no softcap"):
        registry.choose(spec, "torch")


def test_row_16_a_gemma2_on_a_kernel_without_softcap_is_refused(pool: Pools) -> None:
    config: dict[str, object] = {"head_dim": 16, "sliding_window": 6, "attn_logit_softcapping": 2.0}
    with pytest.raises(NotImplementedError, match="backend 'cpu' cannot do this call: it has no softcap"):
        pool(1).run(hf.run_model, "Gemma2ForCausalLM", config, {"backend": "cpu"})
    together, alone = pool(1).run(hf.run_model, "Gemma2ForCausalLM", config, {})[0]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
