"""Every impossible configuration is refused, naming the key and the numbers, before any process group."""

from pathlib import Path

import pytest
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from omegaconf import open_dict
from torch import nn

from ringattn.training.checkpoint import TrainState
from ringattn.training.checkpoint.marker import Marker, write_marker
from ringattn.training.config import checks as config
from ringattn.training.config.checks import check_positions, check_vocabulary, resolve, validate
from ringattn.training.config.curve import curve_differences
from ringattn.training.model import fitness
from ringattn.training.start.job import prepare
from ringattn.training.start.launched import Launch
from ringattn.training.start.output import write_config
from tests.training.recipe import prepared

CONFIGS = Path(__file__).parents[3] / "configs"


def compose_with(*overrides: str):
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return compose("train", list(overrides))


@pytest.mark.parametrize("engine", ["fsdp2", "deepspeed"])
@pytest.mark.parametrize("model", ["tiny", "llama_8b", "qwen3_8b"])
def test_every_group_composes(engine, model, monkeypatch):
    monkeypatch.setattr(config, "deepspeed_available", lambda: True)
    cfg = compose_with(f"engine={engine}", f"model={model}")
    shape = validate(cfg, 8, 8, "cuda")
    assert (shape.data, shape.ring, shape.ulysses) == (1, 8, 1)
    assert resolve(cfg, shape, "cuda")["run"]["dtype"] == "bfloat16"


def test_every_key_has_a_comment():
    for path in CONFIGS.rglob("*.yaml"):
        lines = path.read_text().splitlines()
        bare = [line for line in lines if ":" in line and "#" not in line and not line.rstrip().endswith(":")]
        assert not bare, f"{path}: {bare}"


def test_left_open_is_filled_in():
    cfg = compose_with("parallel.data=2", "parallel.ulysses=2")
    resolved = resolve(cfg, validate(cfg, 8, 8, "cpu"), "cpu")
    assert resolved["data"]["packs_per_step"] == 2
    assert [resolved["parallel"][axis] for axis in ("data", "ring", "ulysses")] == [2, 2, 2]
    assert resolved["run"]["dtype"] == "float32"
    cfg = compose_with("parallel.scheme=ulysses")
    assert validate(cfg, 4, 4, "cpu").ulysses == 4


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.ring=3"], ["parallel.ring", "3", "4"]),
        (["parallel.data=2", "parallel.ring=2", "parallel.ulysses=2"], ["2", "8", "4"]),
        (["parallel.ulysses=0"], ["parallel.ulysses", "0"]),
        (["parallel.head_chunks=0"], ["parallel.head_chunks", "0"]),
        (["parallel.ulysses=4"], ["ulysses", "4", "2"]),  # two ranks a node here
        (["parallel.scheme=hybrid"], ["parallel.scheme=hybrid", "ring=4", "ulysses=1"]),
        (["data.ahead=elsewhere"], ["data.ahead", "elsewhere", "process", "thread"]),
        (["engine.compile=true"], ["engine.compile", "True", "elementwise"]),
        (["parallel.scheme=spiral"], ["parallel.scheme", "spiral", "ring"]),
        (["parallel.policy=best"], ["parallel.policy", "best", "balanced"]),
        (["parallel.backend=fa9"], ["parallel.backend", "fa9"]),
        (["parallel.backend=fa4"], ["parallel.backend=fa4", "GPU"]),
        (["engine.name=fsdp1"], ["engine.name", "fsdp1", "fsdp2"]),
        (["engine=deepspeed", "engine.zero_stage=4"], ["engine.zero_stage", "4"]),
        (["run.dtype=bfloat16"], ["run.dtype=bfloat16", "GPU"]),
        (["run.dtype=fp8"], ["run.dtype", "fp8"]),
        (["run.steps=0"], ["run.steps", "0"]),
        (["+run.stepz=4", "+optim.foo.bar=1"], ["unknown key optim.foo.bar, run.stepz"]),
        (["data=text", "data.files=/a/b"], ["data.files", "/a/b", "list"]),
        (["data=text", "data.add_eos=2"], ["data.add_eos", "2"]),
        (["run.steps=many"], ["run.steps", "many"]),
        (["run.keep=0"], ["run.keep", "0"]),
        (["run.tensorboard=5"], ["run.tensorboard", "5"]),
        (["run.async_save=maybe"], ["run.async_save", "auto, true, false", "maybe"]),
        (["run.max_failed_saves=0"], ["run.max_failed_saves", "0"]),
        (["run.memory_every=-1"], ["run.memory_every", "-1"]),
        (["run.memory_folder=7"], ["run.memory_folder", "7"]),
        (["data.seq_len=0"], ["data.seq_len", "0"]),
        (["data.seq_len=4096.5"], ["data.seq_len", "4096.5"]),
        (["parallel.data=2", "data.packs_per_step=3"], ["data.packs_per_step=3", "2"]),
        (["data.delay=-1"], ["data.delay", "-1"]),
        (["data.delay=2"], ["data.delay=2", "single pack", "data.packs_per_step"]),
        (["data.delay=2", "data.packs_per_step=4", "data.pad=true"], ["data.delay=2", "data.pad"]),
        (["optim.lr=-1"], ["optim.lr", "-1"]),
        (["optim.lr=.nan"], ["optim.lr", "nan"]),
        (["optim.betas=[0.9]"], ["optim.betas", "0.9"]),
        (["optim.min_ratio=2"], ["optim.min_ratio", "2"]),
        (["data=text"], ["data.files"]),
        (["data=text", "data.files=[/no/such/*]"], ["data.files", "/no/such/*"]),
    ],
)
def test_refusals_name_the_key_and_the_numbers(overrides, words, monkeypatch):
    monkeypatch.setattr(config, "deepspeed_available", lambda: True)
    with pytest.raises(ValueError, match=r".") as error:
        validate(compose_with(*overrides), 4, 2, "cpu")
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)
    assert not dist.is_initialized()


def test_a_tokenizer_that_is_not_there(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    cfg = compose_with("data=text", f"data.files=[{tmp_path}]", "data.tokenizer=/no/tokenizer")
    with pytest.raises(ValueError, match=r"data\.tokenizer='/no/tokenizer'"):
        validate(cfg, 1, 1, "cpu")


def test_deepspeed_must_be_installed(monkeypatch):
    monkeypatch.setattr(config, "deepspeed_available", lambda: False)
    with pytest.raises(ValueError, match=r"pip install 'ringattn\[deepspeed\]'"):
        validate(compose_with("engine=deepspeed"), 1, 1, "cpu")


def single(cfg):
    return prepare(cfg, Launch("single", 0, 1, 0, 1, "127.0.0.1", 0))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.config.vocab_size=255", ["model.config.vocab_size=255", "256"]),
        ("model.config.max_position_embeddings=100", ["data.seq_len=4096", "max_position_embeddings=100"]),
        ("+model.config.hidden_sizes=4", ["model.config.hidden_sizes", "LlamaConfig"]),
        ("model.family=mamba", ["model.family", "mamba"]),
        ("model.path=/no/model", ["model.path", "/no/model"]),
    ],
)
def test_models_that_do_not_fit(override, words, tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r".") as error:
        single(compose_with(override, f"run.output={tmp_path}"))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_compiling_needs_a_compiler_and_something_to_compile(monkeypatch):
    assert prepared("engine.compile=elementwise").cfg.engine.compile == "elementwise"
    monkeypatch.setattr(fitness.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match=r"engine.compile=elementwise needs one of c\+\+, g\+\+, clang\+\+, and"):
        prepared("engine.compile=elementwise")
    monkeypatch.setattr(fitness.importlib.util, "find_spec", lambda name: None)
    cfg = prepared().cfg
    with open_dict(cfg):
        cfg.engine.compile = "elementwise"
    with pytest.raises(ValueError, match="needs the package triton"):
        fitness.compile_mode(cfg, "cuda", nn.Linear(2, 2))
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "any")
    with pytest.raises(ValueError, match=r"engine.compile=elementwise: Linear has no norm, gated MLP or rotary"):
        fitness.compile_mode(cfg, "cpu", nn.Linear(2, 2))


def test_the_default_model_fits_its_data():
    pytest.importorskip("transformers")
    job = single(compose_with("run.output=/nowhere"))
    check_vocabulary(job.cfg, job.model_config, job.corpus.vocab_size)
    check_positions(job.cfg, job.model_config, job.corpus)
    assert job.resume is None
    assert not job.done


def checkpoint_in(output: Path, job) -> None:
    folder = output / "checkpoints" / "step-00000005"
    folder.mkdir(parents=True)
    state = TrainState(5, 1, {"epoch": 0, "index": 0, "offset": 0}, job.corpus.fingerprint, "fsdp2", 2)
    write_marker(folder, Marker(state, {}))
    write_config(job.cfg, output)


def test_another_curve_in_the_same_folder_is_refused_unless_forced(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(config, "deepspeed_available", lambda: True)
    output = f"run.output={tmp_path}"
    checkpoint_in(tmp_path, single(compose_with(output)))
    assert single(compose_with(output)).resume[1].step == 5
    same = ["run.save_every=7", "parallel.policy=zigzag", "memory.keep=layer", "run.log_every=3"]
    assert single(compose_with(output, *same)).resume is not None
    with pytest.raises(ValueError, match=r"optim\.lr was 0\.003 and is now 0\.01; run\.steps was .* and is now 7\."):
        single(compose_with(output, "optim.lr=0.01", "run.steps=7"))
    assert single(compose_with(output, "optim.lr=0.01", "run.resume=force")).resume is not None
    assert single(compose_with(output, "run.steps=5", "run.resume=force")).done
    with pytest.raises(ValueError, match=r"engine\.name=deepspeed.* written by fsdp2"):
        single(compose_with(output, "engine=deepspeed", "run.resume=force"))


def test_differences_are_of_what_shapes_the_curve_only():
    old = {"optim": {"lr": 1}, "run": {"seed": 0, "output": "a"}, "parallel": {"ring": 1}, "data": {"prefetch": 1}}
    new = {"optim": {"lr": 1}, "run": {"seed": 1, "output": "b"}, "parallel": {"ring": 2}, "data": {"prefetch": 2}}
    assert curve_differences(old, new) == [("run.seed", 0, 1)]
    assert curve_differences({"data": {}}, {"data": {"delay": None}}) == []  # a key that is newer than the run
    assert curve_differences({"data": {}}, {"data": {"delay": 3}}) == [("data.delay", "(absent)", 3)]
