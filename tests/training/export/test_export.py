"""What is exported computes what was trained: loaded by transformers alone, from any number of ranks."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from safetensors.torch import load_file

from ringattn.hf.tiny import read_config, tiny_config, tiny_model
from ringattn.training.checkpoint.saved_state import SavedState
from ringattn.training.engines.deepspeed import available as deepspeed_available
from ringattn.training.export import ExportOptions, export
from tests.pool import Pools
from tests.training.export.small_runs import IDS, written
from tests.training.recipe import save_model

FLOAT = ExportOptions(dtype="float32")
LORA = "model.lora={rank: 4, alpha: 12, targets: [q_proj, down_proj, lm_head]}"
REST = ((1, "false"), (3, "false"), (1, "true"), (2, "true"))
needs_deepspeed = [
    pytest.mark.skipif(not deepspeed_available(), reason="deepspeed is not installed"),
    pytest.mark.slow,
]


def loaded(folder: Path, **more: Any) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **more)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-5)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_model(tmp_path / "base", vocab_size=300)
    return tmp_path / "base"


def test_a_hybrid_whose_configuration_holds_an_infinity(pool: Pools, tmp_path: Path) -> None:
    layers = ["linear_attention", "full_attention"]
    config = tiny_config(read_config("granitemoehybrid"), layer_types=layers, num_hidden_layers=2, vocab_size=300)
    assert config.time_step_limit[1] == math.inf
    tiny_model(config).save_pretrained(tmp_path / "hybrid")
    (expected,) = written(pool, 2, tmp_path / "run", f"model.path={tmp_path / 'hybrid'}")
    export(tmp_path / "run", tmp_path / "out", FLOAT)
    assert_close(loaded(tmp_path / "out"), expected)


@pytest.mark.parametrize(
    ("ranks", "tied"),
    [(2, "false"), (3, "true"), *(pytest.param(*one, marks=pytest.mark.slow) for one in REST)],
)
def test_logits_are_those_of_training(pool: Pools, ranks: int, tied: str, tmp_path: Path) -> None:
    (expected,) = written(pool, ranks, tmp_path / "run", f"model.config.tie_word_embeddings={tied}")
    done = export(tmp_path / "run", tmp_path / "out", FLOAT)
    assert (done.step, done.dtype) == (2, "float32")
    assert_close(loaded(tmp_path / "out"), expected)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert not [*tmp_path.glob("*.partial")]


@pytest.mark.parametrize("drawn", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["saved", "drawn"])
def test_factors_are_merged(pool: Pools, drawn: bool, base: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    (expected,) = written(pool, 2, tmp_path / "run", LORA, *([] if drawn else [f"model.path={base}"]))
    export(tmp_path / "run", tmp_path / "out", FLOAT)
    assert_close(loaded(tmp_path / "out"), expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == ("default" if drawn else "llama3")


@pytest.mark.slow
def test_factors_of_an_embedding_are_merged(pool: Pools, base: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    lora = "model.lora={rank: 2, targets: [embed_tokens, v_proj]}"
    (expected,) = written(pool, 2, tmp_path / "run", lora, f"model.path={base}")
    export(tmp_path / "run", tmp_path / "out", FLOAT)
    assert_close(loaded(tmp_path / "out"), expected)


@pytest.mark.parametrize(
    "targets",
    [
        "all-linear",
        pytest.param("[q_proj, lm_head]", marks=pytest.mark.slow),
        pytest.param(r"'.*layers\.1\..*(k_proj|up_proj)'", marks=pytest.mark.slow),
    ],
)
def test_an_adapter_is_loaded_by_peft_and_by_transformers(
    pool: Pools, targets: str, base: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    given = (f"model.lora={{rank: 4, alpha: 12, targets: {targets}}}", f"model.path={base}")
    (expected,) = written(pool, 2, tmp_path / "run", *given)
    export(tmp_path / "run", tmp_path / "out", ExportOptions(adapter=True))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size < 40_000
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    with torch.no_grad():
        assert_close(model.eval()(IDS).logits, expected)
    assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(IDS).logits.detach(), expected)


@pytest.mark.slow
def test_an_adapter_needs_its_base(pool: Pools, base: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    adapter = ExportOptions(adapter=True)
    written(pool, 1, tmp_path / "drawn", LORA)
    with pytest.raises(ValueError, match="beside random weights"):
        export(tmp_path / "drawn", tmp_path / "out", adapter)
    written(pool, 1, tmp_path / "long", LORA, f"model.path={base}", "model.rope={type: theta, theta: 77}")
    with pytest.raises(ValueError, match=r"another configuration .* rope_parameters was .*llama3.* and is .*77"):
        export(tmp_path / "long", tmp_path / "out", adapter)
    written(pool, 1, tmp_path / "whole")
    with pytest.raises(ValueError, match=r"no factors of model\.lora"):
        export(tmp_path / "whole", tmp_path / "out", adapter)
    shutil.rmtree(base)
    with pytest.raises(ValueError, match=r"frozen weights of the run cannot be had: .*base"):
        export(tmp_path / "long", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_factors_of_tied_weights_cannot_be_merged(pool: Pools, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    for target in ("embed_tokens", "lm_head"):
        lora = f"model.lora={{rank: 2, targets: [{target}, v_proj]}}"
        written(pool, 1, tmp_path / target, lora, "model.config.tie_word_embeddings=true")
        with pytest.raises(ValueError, match=rf"factors of .*{target} cannot be merged: its weight is tied"):
            export(tmp_path / target, tmp_path / "out")


@pytest.mark.parametrize("saved", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["saved", "drawn"])
def test_frozen_weights_come_from_where_they_came(pool: Pools, saved: bool, base: Path, tmp_path: Path) -> None:
    given = ["model.freeze=['*.embed_tokens.*','*.layers.0.*']", *([f"model.path={base}"] if saved else [])]
    (expected,) = written(pool, 2, tmp_path / "run", *given)
    export(tmp_path / "run", tmp_path / "out", FLOAT)
    assert_close(loaded(tmp_path / "out"), expected)


def test_the_rotary_positions_that_were_trained(pool: Pools, base: Path, tmp_path: Path) -> None:
    rope = "model.rope={type: yarn, factor: 16, original: 256}"
    (expected,) = written(pool, 2, tmp_path / "run", f"model.path={base}", rope)
    export(tmp_path / "run", tmp_path / "out", FLOAT)
    assert_close(loaded(tmp_path / "out"), expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["max_position_embeddings"] == 4096
    assert (config["rope_parameters"]["rope_type"], config["rope_parameters"]["factor"]) == ("yarn", 16.0)
    assert (config["dtype"], config["use_cache"], config["architectures"]) == ("float32", True, ["LlamaForCausalLM"])
    config["rope_parameters"]["factor"] = 2.0
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert (loaded(tmp_path / "out") - expected).abs().max() > 1e-3, "positions do not matter here"


def test_files_and_dtypes(pool: Pools, tmp_path: Path) -> None:
    (expected,) = written(pool, 2, tmp_path / "run")
    whole = export(tmp_path / "run", tmp_path / "many", ExportOptions(dtype="float32", shard_bytes=20_000))
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(shards) > 2
    assert {shard.name for shard in shards} == set(index["weight_map"].values())
    assert all(shard.stat().st_size < 26_000 for shard in shards)
    assert_close(loaded(tmp_path / "many"), expected)
    half = export(tmp_path / "run", tmp_path / "half", ExportOptions(dtype="bfloat16"))
    assert half.size * 2 == whole.size
    assert loaded(tmp_path / "half").dtype == torch.bfloat16
    exact = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    rounded = load_file(tmp_path / "half" / "model.safetensors")
    assert rounded.keys() == exact.keys()
    assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in exact)
    export(tmp_path / "run", tmp_path / "auto")
    assert json.loads((tmp_path / "auto" / "config.json").read_text())["dtype"] == "float32"


def test_one_tensor_is_held_at_a_time(pool: Pools, tmp_path: Path, monkeypatch: Any) -> None:
    """Every tensor that is asked for is gone before the next one is read."""
    import weakref

    alive: list[Any] = []
    whole = SavedState.whole

    def watched(self: SavedState, name: str) -> torch.Tensor:
        assert not [one for one in alive if one() is not None], f"something is kept while {name} is read"
        found = whole(self, name)
        alive.append(weakref.ref(found))
        return found

    written(pool, 2, tmp_path / "run")
    monkeypatch.setattr(SavedState, "whole", watched)
    export(tmp_path / "run", tmp_path / "out")
    assert len(alive) == 21


@pytest.mark.slow
def test_experts_are_saved_as_transformers_saves_them(pool: Pools, tmp_path: Path) -> None:
    from safetensors import safe_open
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=300, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "base")
    (expected,) = written(pool, 2, tmp_path / "run", f"model.path={tmp_path / 'base'}", "data.seq_len=64")
    export(tmp_path / "run", tmp_path / "out", FLOAT)
    assert_close(loaded(tmp_path / "out"), expected)
    names = [set(safe_open(tmp_path / one / "model.safetensors", "pt").keys()) for one in ("base", "out")]
    assert names[0] == names[1]


@pytest.mark.slow
def test_bfloat16_weights(pool: Pools, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    (expected,) = written(pool, 2, tmp_path / "run", "memory.weights=bfloat16", "memory.moments=bfloat16")
    export(tmp_path / "run", tmp_path / "out", FLOAT)
    assert_close(loaded(tmp_path / "out"), expected)


@pytest.mark.parametrize(
    ("stage", "ranks"), [pytest.param(*one, marks=needs_deepspeed) for one in ((1, 2), (2, 2), (3, 2), (3, 3))]
)
def test_deepspeed(pool: Pools, stage: int, ranks: int, base: Path, tmp_path: Path) -> None:
    for name, more in (("whole", ()), ("lora", (LORA, f"model.path={base}"))):
        (expected,) = written(pool, ranks, tmp_path / name, "engine=deepspeed", f"engine.zero_stage={stage}", *more)
        export(tmp_path / name, tmp_path / f"{name}-out", FLOAT)
        assert_close(loaded(tmp_path / f"{name}-out"), expected)
