"""Kernels of other packages: what they are given and give, when they are trusted, and which one is chosen."""

import inspect
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ringattn import Documents, Layout, MeshShape
from ringattn.recurrent import parallel_recurrence
from ringattn.recurrent.kernels import registry, selftest, verdicts
from ringattn.recurrent.kernels.contract import Inputs, Kernel, Signature
from ringattn.recurrent.kernels.fla import Fla
from ringattn.recurrent.kernels.mamba import Mamba
from ringattn.recurrent.kernels.registry import choose_kernel
from ringattn.recurrent.kernels.tokens import Tokens
from tests.recurrent.fake_packages import install
from tests.recurrent.problems import RULES, Truth, alone, inputs
from tests.recurrent.test_recurrence import assert_same, layouts_of, spread

pytestmark = pytest.mark.usefixtures("fresh_caches")

HALF, FLOAT = torch.bfloat16, torch.float32
DELTA = Signature("cpu", (FLOAT, FLOAT, FLOAT, FLOAT, None), 1, 2, 8, 4, False)
SIMPLE = replace(DELTA, dtypes=(FLOAT, FLOAT, FLOAT, None, None))
STEPS = replace(DELTA, dtypes=(FLOAT, FLOAT, FLOAT, None, FLOAT))
ALL = [DELTA, replace(DELTA, diagonal=True), SIMPLE, replace(SIMPLE, diagonal=True), STEPS]
NOT_INSTALLED = "is not installed: pip install flash-linear-attention"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where results are kept."""
    monkeypatch.setenv("RINGATTN_CACHE_DIR", str(tmp_path))
    return tmp_path


def kernels_of(rule: str) -> list[Kernel]:
    return [Fla(), Mamba()] if rule == "steps" else [Fla()]


@pytest.mark.parametrize("rule", RULES)
def test_an_adapter_computes_what_the_contract_says(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    lengths = (3, 70, 1, 17)
    x = inputs(rule, sum(lengths))
    state = torch.randn(4, *x.state_shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for kernel in kernels_of(rule):
        found = []
        for one in (Tokens(), kernel):
            leaves, first = x.leaves(), state.clone().requires_grad_()
            out, last = one.run(leaves, lengths, first)
            whole = one.outputs(leaves, lengths)
            ((out * x.v).sum() + (last * state.flip(0)).sum() + (whole * x.v.flip(0)).sum()).backward()
            grads = [leaf.grad for leaf in leaves if leaf is not None]
            if rule == "steps":  # of a rate that is the same in all rows
                grads[3] = grads[3].sum(0)
            found.append([out, last, whole, first.grad, *grads])
        for expected, got in zip(*found, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
        out, last = kernel.run(x.rows(slice(0, 0)), (), None)
        assert (out.shape, last.shape) == ((0, *x.v.shape[1:]), (0, *x.state_shape))
        assert kernel.outputs(x.rows(slice(0, 0)), ()).shape == out.shape
        assert kernel.run(x, lengths, None)[1].dtype == torch.float64


@pytest.mark.parametrize("route", ["scan", "exchange"])
@pytest.mark.parametrize("rule", RULES)
def test_an_adapter_over_ranks(rule: str, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    docs = Documents([2, 90, 0, 1, 33], [0, 2, 92, 95, 96], 140)
    x = inputs(rule, docs.total)
    dout = torch.randn(x.v.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    truth = alone(x, docs, dout)
    for kernel in kernels_of(rule):
        found = spread(x, layouts_of(docs, 4, 1, "zigzag"), dout, route, kernel)
        if kernel.name == "mamba":
            found.grads[3], expected = found.grads[3].sum(0), truth.grads[3].sum(0)
            truth = Truth(truth.out, [*truth.grads[:3], expected, *truth.grads[4:]])
        assert_same(found, truth)


@pytest.mark.parametrize("signature", ALL, ids=str)
@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
def test_a_right_kernel_is_trusted_and_chosen(
    signature: Signature, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    signature = replace(signature, dtypes=tuple(dtype if one is not None else None for one in signature.dtypes))
    assert choose_kernel(signature).name == ("mamba" if signature.steps else "fla")
    assert choose_kernel(signature, "fla").name == "fla"
    assert choose_kernel(signature, "torch").name == "torch"


def scaled(x: Tensor, factor: float) -> Tensor:
    """x, with gradients times a factor."""
    return x.detach() * (1 - factor) + x * factor


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda out, last: (out, last.detach()), "failed its self-test: .* does not require grad"),
        (lambda out, last: (out, scaled(last, 0.9)), "dstate 0.0"),
        (lambda out, last: (out * 1.1, last), "out 0.1"),
        (lambda out, last: (out, last * 0.9), "last state 0.1"),
        (lambda out, last: (scaled(out, 0.9), last), "dq 0.1"),
        (lambda out, last: (out * float("nan"), last), "out nan"),
        (lambda out, last: (out, 1 / 0), "failed its self-test: ZeroDivisionError"),
    ],
    ids=["no gradient of the last state", "a wrong one", "outputs", "last state", "gradients", "nan", "raises"],
)
def test_a_wrong_kernel_is_refused_by_name(fault: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fault)
    for signature in ALL:
        assert choose_kernel(signature).name == "torch"
        with pytest.raises(NotImplementedError, match=f"no kernel can do this recurrence: fla .*{words}"):
            choose_kernel(signature, "fla")


def test_segments_that_run_into_each_other_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    right = Fla().run

    def leak(x: Inputs, lengths: tuple[int, ...], state: Tensor | None) -> Any:
        out, last = right(x, (lengths[0], *lengths[1:]), state)
        joined = right(x, (sum(lengths),), None if state is None else state[:1])[0]
        return torch.cat([out[: lengths[0]], joined[lengths[0] :]]), last

    kernel: Any = Fla()
    kernel.run = leak
    reason = selftest.failure(kernel, SIMPLE)
    assert reason is not None
    assert reason.startswith("is wrong at dims 8/4 (relative error of out ")


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Fla().missing(DELTA) == NOT_INSTALLED
    assert Mamba().missing(STEPS) == "is not installed: pip install mamba-ssm"
    cuda = replace(DELTA, device="cuda")
    with pytest.warns(UserWarning, match=f"no fused kernel can do this recurrence.*fla {NOT_INSTALLED}"):
        assert choose_kernel(cuda).name == "torch"
    with pytest.raises(NotImplementedError, match=f"fla {NOT_INSTALLED}. Asked for: delta rule with a decay a head, 1"):
        choose_kernel(cuda, "fla")
    install(monkeypatch, chunk_kda=lambda q, k, v, g, beta, scale, cu_seqlens: None, chunk_gla=None)
    kimi, gla = replace(DELTA, diagonal=True), replace(SIMPLE, diagonal=True)
    assert Fla().missing(DELTA) is None
    assert Fla().missing(kimi) == "is installed but its chunk_kda lacks initial_state, output_final_state"
    assert Fla().missing(gla) == "is installed but has another interface: chunk_gla is missing"


@pytest.mark.parametrize(
    ("kernel", "changes", "words"),
    [
        (Fla(), {}, "runs on cuda tensors only, got cpu"),
        (Fla(), {"device": "cuda", "key_dim": 512}, "takes key dims up to 256, got 512"),
        (Fla(), {"device": "cuda", "dtypes": (FLOAT, HALF, FLOAT, None, None)}, "takes q, k and v of one dtype"),
        (Fla(), {"device": "cuda", "dtypes": (torch.float64,) * 3 + (None, None)}, "takes .*, got float64"),
        (Mamba(), {"device": "cuda"}, "computes Mamba-2 alone"),
        (Mamba(), {"device": "cuda", "dtypes": SIMPLE.dtypes}, "takes decays as a rate a head times a step"),
    ],
)
def test_what_a_kernel_is_not_made_for(kernel: Kernel, changes: dict[str, Any], words: str) -> None:
    reason = kernel.refusal(replace(DELTA, **changes))
    assert reason is not None
    assert re.match(words, reason), reason


def test_a_self_test_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpointing counts what a forward pass saves, and draws numbers again as they were."""
    install(monkeypatch)
    saved: list[Tensor] = []
    state = torch.random.get_rng_state()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x)
    with hooks, torch.no_grad(), torch.autocast("cpu", dtype=HALF), torch.device("meta"):
        assert choose_kernel(DELTA).name == "fla"
    assert not saved
    assert torch.equal(state, torch.random.get_rng_state())


def test_it_is_tested_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    install(monkeypatch, lambda out, last: calls.append(0) or (out, last))
    choose_kernel(DELTA)
    first = len(calls)
    choose_kernel.cache_clear()
    choose_kernel(DELTA, "fla")
    assert len(calls) == first > 0
    selftest.forget()
    choose_kernel.cache_clear()
    choose_kernel(DELTA)
    assert len(calls) == 2 * first


def test_the_map_of_a_piece_is_tested_as_it_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward alone: a backward pass over its columns would be compiled for nothing."""
    calls: set[tuple[int, bool]] = set()
    wrong = [1.0]

    def noted(out: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        calls.add((out.shape[-1], out.requires_grad))
        return out, last if out.requires_grad else last * wrong[0]

    install(monkeypatch, noted)
    assert selftest.failure(Fla(), DELTA) is None
    assert calls == {(DELTA.value_dim, True), (DELTA.value_dim + DELTA.key_dim, False)}
    wrong[0] = 0.9
    selftest.forget()
    reason = selftest.failure(Fla(), DELTA)
    assert reason is not None
    assert "is wrong at dims 8/12 (relative error of last state 0.1)" in reason


def test_the_front_door_takes_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    docs = Documents([40, 3, 27])
    x = Inputs(*(None if one is None else one.float() for one in inputs("steps", docs.total)))
    layout = Layout(docs, MeshShape())
    given = {"decay": x.decay[0], "step": x.step, "beta": None}
    found = [parallel_recurrence(x.q, x.k, x.v, layout, backend=name, **given) for name in ("auto", "fla", "tokens")]
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[2])
    assert list(registry.KERNELS) == ["mamba", "fla", "torch", "tokens"]


def guarded_module(monkeypatch: pytest.MonkeyPatch, *, broken: bool, tilelang: bool) -> None:
    """The delta rule in a module that calls `chunk_bwd_dqkwg`, which begins as fla 0.6.0's does."""

    def chunk_bwd_dqkwg(q: Any, k: Any, v: Any, do: Any, h: Any, dh: Any, w: Any = None, g: Any = None) -> Any:
        if tilelang and h.dtype == q.dtype and v.shape[2] % k.shape[2] == 0:
            return torch.empty_like(q)
        if g is not None and broken:
            raise RuntimeError("Triton >= 3.4.0 and < 3.7.1 is wrong here: upgrade Triton or install tilelang")
        return q.new_empty(k.shape)

    module = ModuleType("fla.rule")
    module.chunk_bwd_dqkwg = chunk_bwd_dqkwg  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fla.rule", module)
    for path in ("gated_delta_rule.chunk_gated_delta_rule", "simple_gla.chunk_simple_gla"):
        package, name = path.split(".")
        inspect.unwrap(getattr(sys.modules[f"fla.ops.{package}"], name)).__module__ = "fla.rule"


@pytest.mark.parametrize("tilelang", [False, True])
def test_what_fla_itself_refuses_is_known_before_anything_is_computed(
    tilelang: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the two rules whose backward pass it is, by the versions and the backends that fla itself asks."""
    calls: list[int] = []
    install(monkeypatch, lambda out, last: calls.append(0) or (out, last))
    guarded_module(monkeypatch, broken=True, tilelang=tilelang)
    half = replace(DELTA, dtypes=(HALF, HALF, FLOAT, HALF, None))
    simple, kimi = replace(half, dtypes=(HALF, HALF, FLOAT, None, None)), replace(half, diagonal=True)
    refused = {one: registry.refusal(Fla(), one) for one in (half, simple, kimi, replace(simple, diagonal=True))}
    words = "refuses its own backward pass here: Triton >= 3.4.0 and < 3.7.1 is wrong here: upgrade Triton or install"
    assert refused.pop(simple) == ("package", f"{words} tilelang"), "tilelang takes no states of another dtype"
    assert refused.pop(half) == (None if tilelang else ("package", f"{words} tilelang"))
    assert set(refused.values()) == {None}
    calls.clear()
    selftest.forget()
    assert choose_kernel(simple).name == "torch"
    assert not calls, "a kernel was run that fla refuses"


def test_a_version_of_fla_that_computes_it_is_asked_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    guarded_module(monkeypatch, broken=False, tilelang=False)
    assert Fla().missing(DELTA) is None
    guarded_module(monkeypatch, broken=True, tilelang=False)
    assert Fla().missing(DELTA) is not None
    beside = SimpleNamespace(Whole=SimpleNamespace(can_use=lambda: True))
    monkeypatch.setitem(sys.modules, "fla.backends", beside)
    assert Fla().missing(DELTA) is None, "another backend computes the whole rule"


def test_wrong_numbers_are_kept_for_the_next_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as everything that they depend on is what it was."""
    calls: list[int] = []

    def anew() -> str | None:
        selftest.forget()
        calls.clear()
        return selftest.failure(Fla(), DELTA)

    install(monkeypatch, lambda out, last: calls.append(0) or (out * 1.1, last))
    first = anew()
    assert first is not None
    assert calls
    assert anew() == f"{first}, as found on {found_on(folder)}; remove {folder / 'selftest-1.json'} to test it again"
    assert not calls
    assert selftest.failure(Fla(), replace(DELTA, key_dim=16)) is not None
    assert calls, "another call is tested"
    for name, value in (("_version", lambda name: "9"), ("_machine", lambda device: ()), ("_code", lambda: "")):
        with monkeypatch.context() as patch:
            patch.setattr(verdicts, name, value)
            assert anew() == first
            assert calls, name
    for variable in ("TRITON_F32_DEFAULT", "FLA_TILELANG"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "1")
            assert anew() == first
            assert calls, variable


@pytest.mark.parametrize("fault", [lambda out, last: (out, 1 / 0), lambda out, last: (out, last)], ids=["raises", "ok"])
def test_only_wrong_numbers_are_kept(fault: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What raises may have run out of memory, and what is right is tested again."""
    install(monkeypatch, fault)
    selftest.failure(Fla(), DELTA)
    assert not list(folder.iterdir())


def found_on(folder: Path) -> str:
    (entry,) = json.loads((folder / "selftest-1.json").read_text())["entries"].values()
    return entry["found"]
