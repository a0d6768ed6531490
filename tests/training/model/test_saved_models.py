"""`model.path`: the saved configuration and weights count, and of other keys only what the user set."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from ringattn.training.checkpoint import TrainState
from ringattn.training.checkpoint.marker import Marker, write_marker
from ringattn.training.model.models import build_model
from ringattn.training.model.pretrained import load_weights
from ringattn.training.packs.packing import NO_TARGET, Packer, read_pack
from ringattn.training.report.records import read_metrics
from ringattn.training.start.output import write_config
from tests.training.recipe import prepared, save_model, started

SHORT = ("run.steps=1", "data.seq_len=400", "optim.lr=0")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "saved"
    save_model(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copied"))


def loss_alone(folder: Path, job) -> float:
    """The loss of the first pack's documents, each alone in transformers' own model as it was saved."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    plan = Packer(job.corpus, job.cfg.data.seq_len, job.cfg.run.seed).next()
    pack, begin, total = read_pack(plan, job.corpus), 0, 0.0
    for length in pack.docs.lengths:
        ids, labels = pack.tokens[begin : begin + length], pack.labels[begin : begin + length]
        logits = model(ids[None]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=NO_TARGET, reduction="sum").item()
        begin += length
    return total / pack.targets


@pytest.mark.parametrize("option", ["tiny", "llama_8b"])
def test_a_saved_model_trains_as_it_is_whatever_the_option(option, saved, tmp_path):
    arguments = [f"model={option}", f"model.path={saved}", f"run.output={tmp_path / 'out'}", *SHORT]
    code, out, err = started(tmp_path, *arguments)
    assert code == 0, err
    job = prepared(*arguments, "run.output=/nowhere")
    assert job.model_config.rope_parameters["rope_type"] == "llama3"
    assert job.model_config.max_position_embeddings == 512
    assert read_metrics(tmp_path / "out" / "metrics.jsonl")[0]["loss"] == pytest.approx(
        loss_alone(saved, job), rel=1e-5
    )
    assert f"model.path={saved}: as it was saved" in out
    kept = json.loads((tmp_path / "out" / "model.json").read_text())
    assert (kept["vocab_size"], kept["rope_parameters"]["rope_type"]) == (300, "llama3")


@pytest.mark.parametrize("option", ["tiny", "llama_8b", "qwen3_8b"])
def test_only_keys_that_were_typed_change_it(option, saved):
    plain = prepared(f"model={option}", f"model.path={saved}", "run.output=/nowhere", "data.seq_len=64")
    assert plain.cfg.model.config == {}
    assert plain.cfg.model.name == "saved"
    assert plain.cfg.run.output == "/nowhere"
    typed = ["++model.config.rope_parameters.factor=4.0", "model.config.max_position_embeddings=1024"]
    job = prepared(f"model={option}", f"model.path={saved}", "run.output=/nowhere", "data.seq_len=64", *typed)
    assert job.model_config.rope_parameters == plain.model_config.rope_parameters | {"factor": 4.0}
    assert job.model_config.max_position_embeddings == 1024
    assert job.model_config.vocab_size == 300
    assert "model.config.rope_parameters.factor 8.0 → 4.0" in job.notes[0]
    assert "model.config.max_position_embeddings 512 → 1024" in job.notes[0]
    assert job.cfg.model.config == {"rope_parameters": {"factor": 4.0}, "max_position_embeddings": 1024}


def test_a_typed_key_counts_where_it_says_what_the_option_says(saved):
    job = prepared("model=llama_8b", f"model.path={saved}", "model.config.rms_norm_eps=1.0e-5", "data.seq_len=64")
    assert job.cfg.model.config == {"rms_norm_eps": 1e-5}
    assert job.model_config.rms_norm_eps == 1e-5
    assert "model.config.rms_norm_eps 1e-06 → 1e-05" in job.notes[0]


def test_another_rotary_type_drops_what_belongs_to_the_saved_one(saved):
    typed = ("model=llama_8b", "model.config.rope_parameters.rope_type=default", "data.seq_len=64")
    job = prepared(f"model.path={saved}", *typed)
    assert job.model_config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert "model.config.rope_parameters.factor 8.0 → None" in job.notes[0]


@pytest.mark.parametrize("form", ["model.config=null", "~model.config", "model.config={}"])
def test_no_configuration_is_the_saved_one(form, saved):
    job = prepared(form, f"model.path={saved}", "data.seq_len=64")
    assert job.cfg.model.config == {}
    assert job.model_config.vocab_size == 300


def test_what_the_users_own_files_say_counts(saved, tmp_path):
    """A configuration of theirs changes the saved model; the option of the group that it builds on does not."""
    (tmp_path / "mine.yaml").write_text(
        f"defaults: [train, _self_]\nmodel:\n  path: {saved}\n  config: {{max_position_embeddings: 2048}}\n"
    )
    arguments = ["--config-dir", str(tmp_path), "--config-name", "mine", "model=llama_8b", *SHORT]
    code, out, err = started(tmp_path, *arguments, f"run.output={tmp_path / 'out'}")
    assert code == 0, err
    assert f"model.path={saved}: with model.config.max_position_embeddings 512 → 2048\n" in out


def test_an_option_that_names_the_path_is_meant_for_it(saved, tmp_path):
    (tmp_path / "model").mkdir()
    option = f"name: mine\npath: {saved}\nconfig: {{max_position_embeddings: 4096}}\nlr_from_path: 2.0e-6\n"
    (tmp_path / "model" / "mine.yaml").write_text(option)
    job = prepared(f"hydra.searchpath=[file://{tmp_path}]", "model=mine", "data.seq_len=64")
    assert job.model_config.max_position_embeddings == 4096
    assert (job.cfg.model.name, job.cfg.optim.lr) == ("mine", 2e-6)
    other = "name: shape\nfamily: llama\npath: null\nlr: 1.0e-4\nlr_from_path: 1.0e-6\nconfig: {vocab_size: 256}\n"
    (tmp_path / "model" / "shape.yaml").write_text(other)
    job = prepared(f"hydra.searchpath=[file://{tmp_path}]", "model=shape", f"model.path={saved}", "data.seq_len=64")
    assert job.model_config.vocab_size == 300


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("model.family=qwen3", ["model.family=qwen3", "llama"]),
        ("+model.config.dtype=bfloat16", ["model.config.dtype", "run.dtype"]),
        ("+model.config.attn_implementation=sdpa", ["model.config.attn_implementation"]),
        ("+model.config.rope_parameters.rope_tetha=5.0", ["model.config.rope_parameters.rope_tetha", "Unrecognized"]),
        ("+model.config.rope_theta=5.0", ["model.config.rope_theta", "LlamaConfig"]),
        ("model.config.hidden_size=wide", ["model.config.hidden_size", "wide"]),
        ("model.config.tie_word_embeddings=true", ["model.config.tie_word_embeddings"]),
    ],
)
def test_changes_that_would_not_be_what_they_say(typed, words, saved):
    with pytest.raises(ValueError, match=r".") as error:
        prepared(f"model.path={saved}", typed, "data.seq_len=64")
    assert all(word in str(error.value) for word in words), error.value


# --- going on


def with_checkpoint(output: Path, *overrides: str, **changes: Any) -> None:
    """What a run leaves behind after its fifth step, as far as the next start looks at it."""
    job = prepared(*overrides, f"run.output={output}")
    folder = output / "checkpoints" / "step-00000005"
    folder.mkdir(parents=True)
    position = {"epoch": 0, "index": 3, "offset": 7} | changes
    state = TrainState(5, 1, position, job.corpus.fingerprint, "fsdp2", 1)
    write_marker(folder, Marker(state, {}))
    write_config(job.cfg, output, job.model_config)


def test_going_on_needs_what_was_chosen_and_not_the_option(saved, tmp_path):
    same = (f"model.path={saved}", f"run.output={tmp_path}", "data.seq_len=64")
    with_checkpoint(tmp_path, *same, "++model.config.rms_norm_eps=1.0e-5")
    for option in ("tiny", "llama_8b"):
        job = prepared(*same, f"model={option}", "++model.config.rms_norm_eps=1.0e-5")
        assert job.resume is not None
        assert job.model_config.rms_norm_eps == 1e-5
    with pytest.raises(ValueError, match=r"model\.config\.rms_norm_eps was 1e-05 and is now \"\(absent\)\""):
        prepared(*same)
    with pytest.raises(ValueError, match=r"model\.config\.rms_norm_eps was 1e-05 and is now 0\.1"):
        prepared(*same, "++model.config.rms_norm_eps=0.1")


def test_a_configuration_that_changed_in_its_folder_is_noticed(copied, tmp_path):
    output = tmp_path / "out"
    same = (f"model.path={copied}", f"run.output={output}", "data.seq_len=64")
    with_checkpoint(output, *same)
    assert prepared(*same).resume is not None
    config = json.loads((copied / "config.json").read_text())
    config["rope_parameters"]["factor"] = 16.0
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model\.config\.rope_parameters was .*8\.0.* and is now .*16\.0"):
        prepared(*same)
    assert prepared(*same, "run.resume=force").model_config.rope_parameters["factor"] == 16.0


def test_force_does_not_take_the_weights_of_another_model(tmp_path):
    output = f"run.output={tmp_path}"
    with_checkpoint(tmp_path, "model.config.hidden_size=64")
    with pytest.raises(
        ValueError, match=r"another model .* 21 weights differ: lm_head\.weight \(256, 64\) → \(256, 32\)"
    ):
        prepared(output, "model.config.hidden_size=32", "run.resume=force")


# --- weights


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("num_hidden_layers=4", ["18 missing", "model.layers.2.input_layernorm.weight", "10 more"]),
        ("num_hidden_layers=1", ["9 unexpected", "model.layers.1.mlp.down_proj.weight"]),
        ("vocab_size=301", ["2 of another shape", "lm_head.weight ([300, 32] in the file, [301, 32] in the model)"]),
    ],
)
def test_weights_that_differ_are_refused_with_their_names(typed, words, saved):
    with pytest.raises(ValueError, match=r"model\.allow_mismatch") as error:
        prepared(f"model.path={saved}", f"model.config.{typed}", "data.seq_len=64")
    assert all(word in str(error.value) for word in words), error.value


def test_named_weights_may_differ_and_are_drawn_from_the_seed(saved):
    typed = (f"model.path={saved}", "model.config.num_hidden_layers=3", "data.seq_len=64")
    job = prepared(*typed, "model.allow_mismatch=['model.layers.2.*']")
    assert "9 missing: model.layers.2.input_layernorm.weight" in job.notes[1]
    with pytest.raises(ValueError, match="9 missing"):
        prepared(*typed, "model.allow_mismatch=['*.bias']")
    with pytest.raises(ValueError, match=r"no weight that differs matches '\*\.bias'"):
        prepared(*typed, "model.allow_mismatch=['model.layers.2.*','*.bias']")
    before = torch.get_rng_state()
    one, two, other = (build_model(job.model_config, seed, str(saved), ["model.layers.2.*"]) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    loaded = build_model(prepared(f"model.path={saved}", "data.seq_len=64").model_config, 0, str(saved)).state_dict()
    for (name, a), b, c in zip(one.named_parameters(), two.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        if ".layers.2." in name:
            assert a.dim() < 2 or not torch.equal(a, c), name
        else:
            assert torch.equal(a, loaded[name]), name


def test_tied_weights_are_not_missing(tmp_path):
    save_model(tmp_path / "tied", tie_word_embeddings=True)
    job = prepared(f"model.path={tmp_path / 'tied'}", "data.seq_len=64")
    assert job.model_config.tie_word_embeddings
    assert load_weights(job.model_config, str(tmp_path / "tied"))[1] == ""
    with pytest.raises(ValueError, match=r"1 missing: lm_head\.weight"):
        prepared(f"model.path={tmp_path / 'tied'}", "model.config.tie_word_embeddings=false", "data.seq_len=64")


def test_patterns_without_a_path_are_refused():
    with pytest.raises(ValueError, match=r"model\.allow_mismatch .* model\.path"):
        prepared("model.allow_mismatch=[lm_head.*]")


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def point_to_lfs(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 99\n")


def lose_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def keep_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncate_pickle(folder: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:-100])


def quantize(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def invent_a_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama99"}')


def encode_only(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "clip"}')


def keep_an_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, ["model.safetensors", "incomplete"]),
        (point_to_lfs, ["model.safetensors", "git lfs pull"]),
        (lose_a_shard, ["model-00001-of-00002.safetensors", "not there"]),
        (keep_no_weights, ["no weights", "model.safetensors"]),
        (truncate_pickle, ["pytorch_model.bin", "incomplete"]),
        (quantize, ["quantized"]),
        (break_config, ["config.json", "cannot be read"]),
        (invent_a_type, ["config.json", "llama99"]),
        (encode_only, ["clip", "causal"]),
        (keep_an_adapter, ["PEFT adapter"]),
    ],
)
def test_folders_that_cannot_be_loaded_say_which_file_is_why(damage, words, copied):
    damage(copied)
    with pytest.raises(ValueError, match=r"model\.path=") as error:
        prepared(f"model.path={copied}", "data.seq_len=64")
    assert all(word in str(error.value) for word in [str(copied), *words]), error.value
    assert "\n" not in str(error.value)


def test_a_pickled_model_is_read_as_well(copied):
    from safetensors.torch import load_file

    weights = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    torch.save(weights, copied / "pytorch_model.bin")
    job = prepared(f"model.path={copied}", "data.seq_len=64")
    loaded = build_model(job.model_config, 0, str(copied)).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


# --- learning rates


@pytest.mark.parametrize(("option", "rate"), [("tiny", 3e-3), ("llama_8b", 3e-4), ("qwen3_8b", 3e-4)])
def test_the_learning_rate_is_the_models(option, rate, saved):
    assert prepared(f"model={option}", "run.output=/nowhere", "memory=off").cfg.optim.lr == rate
    assert prepared(f"model={option}", f"model.path={saved}", "data.seq_len=64").cfg.optim.lr == 1e-5
    assert prepared(f"model={option}", "optim.lr=0.5", "memory=off").cfg.optim.lr == 0.5
    assert prepared(f"model={option}", "model.lr=0.25", "memory=off").cfg.optim.lr == 0.25


def test_a_model_without_a_learning_rate_needs_one():
    with pytest.raises(ValueError, match=r"optim\.lr is null, and so is model\.lr"):
        prepared("model.lr=null")
    with pytest.raises(ValueError, match=r"optim\.lr is null, and so is model\.lr"):
        prepared("~model.lr")
    assert prepared("model.lr=null", "optim.lr=0.5").cfg.optim.lr == 0.5
