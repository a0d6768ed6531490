"""`model.lora`: the same curve as a plain loop with PEFT on one process, whoever shards it; and what it refuses."""

import json
import shutil
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from ringattn import Documents, Layout, SequenceMesh
from ringattn.hf import parallelize
from ringattn.hf.elementwise import Elementwise
from ringattn.hf.layers import decoder_layers, mlps_of
from ringattn.hf.shape import model_shape
from ringattn.memory.settings import MemorySettings, StateSettings
from ringattn.training.checkpoint import SavedState
from ringattn.training.config.curve import curve_differences
from ringattn.training.engines import Engine, EngineOptions, build_engine
from ringattn.training.engines.deepspeed import available as deepspeed_available
from ringattn.training.loss import brought
from ringattn.training.model.flops import StepFlops
from ringattn.training.model.lora import Lora, check_same_base, lora_of
from ringattn.training.model.models import build_model, empty_model, model_config
from tests.parallel.ranks import mesh_of
from tests.pool import Pools
from tests.training.parts import load_parts, save_parts
from tests.training.recipe import THREE_LAYERS, prepared, save_model, started
from tests.training.token_loss import model_loss, token_loss_sum

SIZES = THREE_LAYERS
DOCS = Documents([40, 7, 100])
STEPS, RATE, SEED = 5, 3e-2, 3
GIVEN: dict[str, Any] = {"weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
SMALL = Lora(4, 8.0)
ZERO_3 = "zero_pp_rank_0_mp_rank_00_model_states.pt"
needs_deepspeed = [
    pytest.mark.skipif(not deepspeed_available(), reason="deepspeed is not installed"),
    pytest.mark.slow,
]

Curve = list[tuple[float, float]]


def tokens(step: int) -> torch.Tensor:
    return torch.randint(0, 64, (DOCS.total,), generator=torch.Generator().manual_seed(step))


def config_of(tied: bool) -> Any:
    return model_config("llama", None, SIZES | {"tie_word_embeddings": tied})


@cache
def alone(lora: Lora, tied: bool = False, rate: float = RATE) -> Curve:
    """(loss, gradient norm) of a loop with PEFT's own wrapper, eager attention, and each document run alone."""
    from peft import LoraConfig, get_peft_model

    base: Any = build_model(config_of(tied), SEED)
    base.set_attn_implementation("eager")
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model: Any = get_peft_model(base, LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, found = torch.optim.AdamW(trained, lr=rate, **GIVEN), []
    for step in range(STEPS):
        ids = tokens(step).split(list(DOCS.lengths))
        loss = sum(token_loss_sum(model(input_ids=one[None], use_cache=False).logits[0], one) for one in ids)
        (loss / DOCS.total).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item() / DOCS.total, norm.item()))
    return found


def engine_of(
    mesh: SequenceMesh,
    lora: Lora,
    stage: int,
    memory: MemorySettings | None = None,
    tied: bool = False,
    compiled: bool = False,
    states: StateSettings | None = None,
) -> Engine:
    """FSDP2 at stage 0, else DeepSpeed."""
    config = config_of(tied)

    def attach(model: torch.nn.Module) -> None:
        if compiled:
            Elementwise(model, backend="aot_eager")
        parallelize(model, mesh, memory)

    options = EngineOptions(
        empty=partial(empty_model, config, lora),
        load=partial(build_model, config, SEED, lora=lora),
        attach=attach,
        device=mesh.device,
        dtype=torch.float32,
        clip=1.0,
        micro_steps=1,
        zero_stage=stage,
        states=states or StateSettings(),
        **GIVEN,
    )
    return build_engine("deepspeed" if stage else "fsdp2", mesh, options)


def train(engine: Engine, mesh: SequenceMesh, first: int = 0, last: int = STEPS) -> Curve:
    found = []
    for step in range(first, last):
        layout = Layout(DOCS, mesh)
        loss = model_loss(engine.model, layout, layout.shard(tokens(step)).to(mesh.device))
        engine.backward(loss)
        found.append(brought(loss, engine.step(RATE), False)[:2])
    return found


def curve(ring: int, ulysses: int, lora: Lora, stage: int = 0, **changes: Any) -> Curve:
    mesh = mesh_of(ring, ulysses)
    with torch.compiler.set_stance("default" if changes.get("compiled") else "force_eager"):
        return train(engine_of(mesh, lora, stage, **changes), mesh)


def assert_same(found: list[Curve], lora: Lora, tied: bool = False) -> None:
    """The curve of a plain loop on every rank, in which the factors must have moved."""
    expected = alone(lora, tied)
    assert abs(expected[-1][0] - alone(lora, tied, 0.0)[-1][0]) > 0.01
    assert_close(found, expected)


def assert_close(found: list[Curve], expected: Curve) -> None:
    for one in found:
        assert [x for pair in one for x in pair] == pytest.approx([x for pair in expected for x in pair], rel=1e-5)


MESHES = [(1, 1), (2, 1), (1, 2)]


@pytest.mark.parametrize(("ring", "ulysses"), MESHES)
@pytest.mark.parametrize(
    "stage", [0, pytest.param(1, marks=needs_deepspeed), pytest.param(2, marks=needs_deepspeed),
              pytest.param(3, marks=needs_deepspeed)]
)  # fmt: skip
def test_engines_train_as_a_plain_loop_with_peft(pool: Pools, ring: int, ulysses: int, stage: int) -> None:
    assert_same(pool(ring * ulysses).run(curve, ring, ulysses, SMALL, stage), SMALL)


@pytest.mark.parametrize(
    ("lora", "tied"),
    [
        (Lora(1, 8.0, ("q_proj", "mlp.down_proj")), False),
        (Lora(4, 2.0, r".*layers\.[01]\..*(k_proj|up_proj)"), True),
        (Lora(4, 8.0, ("embed_tokens", "v_proj", "lm_head")), False),
        (Lora(4, 8.0, ("embed_tokens", "v_proj", "lm_head")), True),
    ],
    ids=str,
)
def test_any_targets(pool: Pools, lora: Lora, tied: bool) -> None:
    """A rank of 1 leaves the second process without a share of one factor."""
    assert_same(pool(2).run(curve, 2, 1, lora, tied=tied), lora, tied)


MEMORY = {
    "tiles": MemorySettings(loss_tile=16, mlp_tile=16),
    "layer": MemorySettings(keep="layer"),
    "every": MemorySettings(keep="attention", every=2),
    "selective": MemorySettings(keep="selective"),
    "host": MemorySettings(loss_tile=16, mlp_tile=16, keep="attention", host_layers=2, host_bytes=1 << 22),
}


@pytest.mark.parametrize("name", MEMORY)
@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=needs_deepspeed)])
def test_settings_of_memory_change_nothing(pool: Pools, name: str, stage: int) -> None:
    assert_same(pool(2).run(curve, 2, 1, SMALL, stage, memory=MEMORY[name]), SMALL)


@pytest.mark.parametrize(
    "states", [StateSettings(states_on="host"), StateSettings(prefetch=0), StateSettings(reshard=False)], ids=str
)
def test_where_states_are_changes_nothing(pool: Pools, states: StateSettings) -> None:
    assert_same(pool(2).run(curve, 2, 1, SMALL, states=states), SMALL)


def test_compiled_elementwise_work_changes_nothing(pool: Pools) -> None:
    assert_same(pool(2).run(curve, 2, 1, SMALL, compiled=True), SMALL)


def after_training(states: StateSettings) -> tuple[dict[str, torch.Tensor], set[str], set[str]]:
    """Weights after some steps, which of them the optimizer has states of, and the dtypes of all."""
    mesh = mesh_of(2, 1)
    with torch.compiler.set_stance("force_eager"):
        engine: Any = engine_of(mesh, SMALL, 0, states=states)
        train(engine, mesh, 0, 3)
    names = {parameter: name for name, parameter in engine.model.named_parameters()}
    assert all(parameter.grad is None for parameter in names)
    moved = {names[parameter] for parameter in engine._optimizer.state}
    weights = {name: parameter.detach().full_tensor() for parameter, name in names.items()}
    return weights, moved, {str(parameter.dtype) for parameter in names}


def test_the_base_has_no_states_and_stays(pool: Pools) -> None:
    base = dict(build_model(config_of(False), SEED).named_parameters())
    for weights, moved, dtypes in pool(2).run(after_training, StateSettings()):
        assert dtypes == {"torch.float32"}
        assert moved == {name for name in weights if "lora_" in name}
        frozen = {name: weight for name, weight in weights.items() if name not in moved}
        assert {name.replace(".base_layer", "") for name in frozen} == base.keys()
        assert all(torch.equal(weight, base[name.replace(".base_layer", "")]) for name, weight in frozen.items())
        assert all(weights[name].any() for name in moved), "the second factors begin at 0"


def test_bfloat16_weights_are_those_of_base_and_factors(pool: Pools) -> None:
    pytest.importorskip("torchao")
    base = dict(build_model(config_of(False), SEED).named_parameters())
    weights, moved, dtypes = pool(2).run(after_training, StateSettings(weights="bfloat16", moments="bfloat16"))[0]
    assert dtypes == {"torch.bfloat16"}
    for name in weights.keys() - moved:
        assert torch.equal(weights[name], base[name.replace(".base_layer", "")].bfloat16())


def resumed(folder: Path, stage: int, write: bool) -> Curve:
    """The last steps of a run that writes in between, or the same after reading that."""
    mesh = mesh_of(torch.distributed.get_world_size(), 1)
    engine = engine_of(mesh, SMALL, stage)
    if write:
        train(engine, mesh, 0, 2)
        save_parts(engine, folder)
    else:
        load_parts(engine, folder)
    return train(engine, mesh, 2)


@pytest.mark.parametrize("stage", [0, *(pytest.param(one, marks=needs_deepspeed) for one in (1, 2, 3))])
def test_a_checkpoint_goes_on_exactly_and_holds_no_base(pool: Pools, stage: int, tmp_path: Path) -> None:
    written = pool(2).run(resumed, tmp_path, stage, True)
    assert pool(2).run(resumed, tmp_path, stage, False) == written
    saved = SavedState.of(tmp_path, 0)
    if stage:
        held = saved.subtree("engine", "mp_rank_00_model_states.pt" if stage < 3 else ZERO_3)
        assert held["module"]
        assert all("lora_" in name for name in held["module"])
        assert not held.get("frozen_param_fragments")
        return
    for kind in ("model", "optim"):
        names = saved.subtree("engine", kind)
        assert names
        assert all("lora_" in name for name in names)
    assert_close(pool(1).run(resumed, tmp_path, stage, False), written[0])


def test_factors_are_those_of_peft_and_the_seed():
    from peft import LoraConfig, get_peft_model

    before = torch.get_rng_state()
    model = build_model(config_of(False), SEED, lora=SMALL)
    empty = empty_model(config_of(False), SMALL)
    assert torch.equal(torch.get_rng_state(), before)
    base = build_model(config_of(False), SEED)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        wrapped = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    expected = {name.removeprefix("base_model.model."): one for name, one in wrapped.named_parameters()}
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys() == dict(empty.named_parameters()).keys()
    for name, parameter in found.items():
        assert torch.equal(parameter, expected[name]), name
        assert parameter.requires_grad == expected[name].requires_grad == ("lora_" in name)
    assert all(parameter.is_meta for parameter in empty.parameters())
    other = dict(build_model(config_of(False), SEED + 1, lora=SMALL).named_parameters())
    assert not any(torch.equal(found[name], one) for name, one in other.items() if "lora_A" in name)


def test_models_are_found_and_counted_through_the_factors():
    config = config_of(False)
    model, plain = empty_model(config, SMALL), empty_model(config)
    assert type(model) is type(plain)
    assert len(decoder_layers(model)) == len(mlps_of(model)) == 3
    widths = 3 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 48) * 3)
    trained = 4 * widths
    shape, without = model_shape(model, config), model_shape(plain, config)
    assert shape.total.trained == trained
    assert shape.total.count == without.total.count + trained
    assert (shape.head.trained, shape.embedding.trained, shape.rest.trained) == (0, 0, 0)
    assert (shape.mlps[0].gated, shape.mlps[0].inner) == (without.mlps[0].gated, without.mlps[0].inner)
    assert shape.head_norms == without.head_norms
    assert shape.active == without.active + trained // 3
    assert (without.backward, shape.backward) == (2.0, 1 + trained / shape.total.count)
    flops = StepFlops.of(model, config)
    assert flops.parameters == StepFlops.of(plain, config).parameters + trained
    assert flops.per_token == 4 * (flops.parameters - trained) + 6 * trained


RUN = [
    *(f"model.config.{key}={value}" for key, value in SIZES.items() if key != "vocab_size"),
    "data.seq_len=128", "run.steps=4", "run.save_every=2", "run.tensorboard=false", "run.keep=5",
    "optim.lr=1e-2",
]  # fmt: skip


@pytest.mark.slow
def test_the_recipe_goes_on_from_its_factors(tmp_path):
    def losses() -> list[float]:
        lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    def lora(rank: int, alpha: int) -> str:
        return f"model.lora={{rank: {rank}, alpha: {alpha}, targets: [q_proj, up_proj]}}"

    run = [*RUN, f"run.output={tmp_path / 'out'}"]
    given = [*run, "model.lora={rank: 4, targets: [q_proj, up_proj]}"]
    code, out, err = started(tmp_path, *given)
    assert code == 0, out + err
    assert "rank 4, alpha 8, targets [q_proj, up_proj]; 1,728 of" in out
    assert "warning: model.lora without model.path" in out
    whole = losses()
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-00000004")
    code, out, err = started(tmp_path, *given)
    assert code == 0, out + err
    assert "from step 2" in out
    assert losses() == whole
    with pytest.raises(ValueError, match=r"model\.lora\.rank was 4 and is now 8"):
        prepared(*run, lora(8, 8))
    with pytest.raises(ValueError, match=r"another model .*lora_A"):
        prepared(*run, lora(8, 8), "run.resume=force")
    with pytest.raises(ValueError, match=r"another model"):
        prepared(*run, "run.resume=force")
    with pytest.raises(ValueError, match=r"another frozen model.*run\.seed was 0 and is now 1"):
        prepared(*given, "run.seed=1", "run.resume=force")
    assert prepared(*run, lora(4, 16), "run.resume=force").resume


def test_a_base_is_where_its_weights_come_from():
    def cfg(path: str | None, seed: int, allow: list[str] | None = None, lora: Any = None) -> dict[str, Any]:
        model = {"path": path, "allow_mismatch": allow or [], "lora": lora or {"rank": 4}}
        return {"model": model, "run": {"seed": seed}}

    check_same_base(cfg("/a", 0), cfg("/a", 1))  # the seed draws nothing of it
    with pytest.raises(ValueError, match=r"model\.path was '/a' and is now '/b'"):
        check_same_base(cfg("/a", 0), cfg("/b", 0))
    with pytest.raises(ValueError, match=r"run\.seed was 0 and is now 1"):
        check_same_base(cfg("/a", 0, ["lm_head.*"]), cfg("/a", 1, ["lm_head.*"]))
    whole = {"model": {"path": "/a"}, "run": {"seed": 0}}
    check_same_base(whole, whole | {"model": {"path": "/b"}})  # a checkpoint that holds all weights


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("3", ["model.lora must be", "rank: 16", "3"]),
        ("{}", ["model.lora must be", "{}"]),
        ("{alpha: 3}", ["model.lora must be", "alpha"]),
        ("{rank: 4, dropout: 0.1}", ["model.lora must be", "dropout"]),
        ("{rank: 0}", ["model.lora.rank", "at least 1", "0"]),
        ("{rank: 4.0}", ["model.lora.rank", "integer", "4.0"]),
        ("{rank: 4, alpha: 0}", ["model.lora.alpha", "above 0"]),
        ("{rank: 4, alpha: .inf}", ["model.lora.alpha", "finite"]),
        ("{rank: 4, targets: []}", ["model.lora.targets", "all-linear", "[]"]),
        ("{rank: 4, targets: [1]}", ["model.lora.targets", "[1]"]),
        ("{rank: 4, targets: [q_proj, w_proj]}", ["model.lora.targets", "LlamaForCausalLM", "'w_proj'"]),
        ("{rank: 4, targets: w_proj}", ["model.lora.targets", "w_proj", "not found"]),
        ("{rank: 4, targets: [norm]}", ["model.lora.targets", "LlamaRMSNorm"]),
        ("{rank: 4, targets: '('}", ["model.lora.targets", "("]),
    ],
)
def test_refusals_name_the_key(given, words, tmp_path):
    with pytest.raises(ValueError, match=r"model\.lora") as error:
        prepared(f"run.output={tmp_path}", f"model.lora={given}")
    assert all(word in str(error.value) for word in words), error.value


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"model\.lora needs .* pip install 'ringattn\[hf\]'"):
        prepared(f"run.output={tmp_path}", "model.lora={rank: 4}", "run.tensorboard=false")


def test_what_is_left_out_is_filled_in(tmp_path):
    cfg = prepared(f"run.output={tmp_path}", "model.lora={rank: 4}").cfg
    assert dict(cfg.model.lora) == {"rank": 4, "alpha": 8, "targets": "all-linear"}
    assert lora_of(cfg.model) == Lora(4, 8, "all-linear")
    assert prepared(f"run.output={tmp_path}").cfg.model.lora is None
    old, new = {"model": {"lora": None}}, {"model": {"lora": {"rank": 4}}}
    assert [key for key, _, _ in curve_differences(old, new)] == ["model.lora.rank"]
    assert curve_differences({"model": {}}, old) == []


def test_factors_of_the_head_leave_its_loss_whole(tmp_path):
    given = [f"run.output={tmp_path}", "model.lora={rank: 4, targets: [lm_head]}"]
    assert prepared(*given, "memory=auto").plan.memory.loss_tile is None
    with pytest.raises(ValueError, match=r"memory\.loss_tile=16: LlamaForCausalLM has an adapter.* as its head"):
        prepared(*given, "memory.loss_tile=16")


def test_a_saved_model_keeps_its_own_rate_unless_told(tmp_path):
    save_model(tmp_path / "model")
    given = [f"run.output={tmp_path / 'out'}", f"model.path={tmp_path / 'model'}", "data.seq_len=128"]
    given.append("model.lora={rank: 4}")
    notes = " ".join(prepared(*given).notes)
    assert "1e-05 is for training all weights" in notes
    assert "optim.lr=0.0001" in notes
    assert "without model.path" not in notes
    assert "rate" not in " ".join(prepared(*given, "optim.lr=1e-4").notes)
