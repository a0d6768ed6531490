"""Saved weights that every rank reads for itself: the same model as one that was loaded whole, in pieces."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from ringattn.hf import parallelize
from ringattn.memory.settings import StateSettings
from ringattn.training.engines import EngineOptions, build_engine
from ringattn.training.model.architecture import configured
from ringattn.training.model.lora import Lora
from ringattn.training.model.models import build_model, empty_model
from ringattn.training.model.streamed import skeleton, streamed_weights
from ringattn.training.model.weight_files import WeightFiles
from tests.parallel.ranks import mesh_of
from tests.pool import Pools
from tests.training.recipe import save_model

LORA = Lora(4, 8.0, ("embed_tokens", "q_proj", "down_proj"))

REST = (("saved", 1, None), ("saved", 3, LORA), ("tied", 1, LORA), ("tied", 3, None))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A model in several files, in bfloat16 as published ones are."""
    folder = tmp_path_factory.mktemp("models") / "saved"
    model = save_model(folder)
    shutil.rmtree(folder)
    model.bfloat16().save_pretrained(folder, max_shard_size="20KB")
    assert len([*folder.glob("*.safetensors")]) > 2
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tied"
    save_model(folder, tie_word_embeddings=True, vocab_size=301)
    return folder


def state_of(path: Path, lora: Lora | None, states: StateSettings, whole: bool) -> tuple[dict[str, Any], list[int]]:
    """The sharded model's parameters and buffers, and the bytes of each piece that this rank read."""
    read: list[int] = []
    rows = WeightFiles.rows

    def counted(self: WeightFiles, *arguments: Any) -> torch.Tensor:
        found = rows(self, *arguments)
        read.append(found.nbytes)
        return found

    def load() -> Any:
        assert whole, "the whole was loaded"
        return build_model(config, 3, str(path), (), lora)

    mesh, config = mesh_of(torch.distributed.get_world_size(), 1), configured(None, str(path), {})[0]
    WeightFiles.rows = counted  # type: ignore[method-assign]
    try:
        engine = build_engine("fsdp2", mesh, EngineOptions(
            empty=lambda: empty_model(config, lora),
            load=load,
            stream=None if whole else lambda: streamed_weights(config, 3, str(path), lora),
            attach=lambda model: parallelize(model, mesh),
            device=mesh.device,
            dtype=torch.float32,
            weight_decay=0.1,
            betas=(0.9, 0.95),
            eps=1e-8,
            clip=1.0,
            micro_steps=1,
            zero_stage=0,
            states=states,
        ))  # fmt: skip
    finally:
        WeightFiles.rows = rows  # type: ignore[method-assign]
    found: dict[str, Any] = {name: one.detach().full_tensor() for name, one in engine.model.named_parameters()}  # type: ignore[attr-defined]
    return found | dict(engine.model.named_buffers()), read


@pytest.mark.parametrize(
    ("which", "ranks", "lora"),
    [
        ("saved", 3, None),
        ("tied", 3, LORA),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in REST),
    ],
    ids=str,
)
def test_it_is_the_model_that_one_rank_loads(pool: Pools, ranks: int, lora: Any, which: str, request: Any) -> None:
    path = request.getfixturevalue(which)
    expected = pool(ranks).run(state_of, path, lora, StateSettings(), True)[0][0]
    files = WeightFiles.of(str(path))
    assert files is not None
    total = sum(files.rows(name).nbytes for name in files.names())
    found = pool(ranks).run(state_of, path, lora, StateSettings(), False)
    for state, _ in found:
        assert state.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(state[name], tensor), name
    assert sum(sum(read) for _, read in found) == total, "every byte is read once, by one rank"
    largest = max(files.rows(name).nbytes for name in files.names())
    assert max(max(read) for _, read in found) <= -(-largest // ranks) + 128  # a row


@pytest.mark.slow
@pytest.mark.parametrize(
    "states", [StateSettings(states_on="host"), StateSettings(weights="bfloat16", moments="bfloat16")]
)
def test_wherever_weights_are_and_in_what(pool: Pools, states: StateSettings, saved: Path) -> None:
    if states.weights != "float32":
        pytest.importorskip("torchao")
    expected, found = (pool(2).run(state_of, saved, None, states, whole)[0][0] for whole in (True, False))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in expected.items()}


def test_what_no_file_holds_as_it_is_is_loaded_whole(saved: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    config = configured(None, str(saved), {})[0]
    assert streamed_weights(config, 0, str(saved), None) is not None
    assert streamed_weights(config, 0, None, None) is None
    assert streamed_weights(configured(None, str(saved), {"vocab_size": 301})[0], 0, str(saved), None) is None
    assert streamed_weights(configured(None, str(saved), {"num_hidden_layers": 1})[0], 0, str(saved), None) is None
    save_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name.removeprefix("model."): one for name, one in weights.items()}, tmp_path / "model.safetensors")
    assert streamed_weights(config, 0, str(tmp_path), None) is None
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert streamed_weights(config, 0, str(tmp_path), None) is None


def test_experts_that_transformers_joins_are_loaded_whole(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    assert streamed_weights(config, 0, str(tmp_path), None) is None


def test_a_skeleton_takes_no_memory_and_leaves_random_numbers_alone(saved: Path) -> None:
    config = configured(None, str(saved), {})[0]
    before = torch.get_rng_state()
    model = skeleton(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.untyped_storage().nbytes() <= 8 for p in model.parameters())
    expected = build_model(config, 0)
    assert [(n, p.shape) for n, p in model.named_parameters()] == [(n, p.shape) for n, p in expected.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), expected.buffers(), strict=True))
