"""Runs of a few steps as they lie in a folder: configuration, model and checkpoint, made by ranks of a pool."""

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from ringattn import Documents, Layout
from ringattn.hf import parallelize
from ringattn.memory.settings import StateSettings
from ringattn.training.checkpoint import Place, TrainState
from ringattn.training.checkpoint.snapshot import snapshot_of
from ringattn.training.checkpoint.together import Together
from ringattn.training.checkpoint.writing import write_checkpoint
from ringattn.training.engines import EngineOptions, build_engine
from ringattn.training.engines.interface import STATE
from ringattn.training.model.lora import lora_of
from ringattn.training.model.models import build_model, empty_model
from ringattn.training.model.streamed import streamed_weights
from ringattn.training.start.output import write_config
from tests.parallel.ranks import mesh_of
from tests.training.recipe import prepared
from tests.training.token_loss import model_loss

SIZES = {
    "vocab_size": 300,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
    "max_position_embeddings": 4096,
}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %} {% endfor %}"
)
IDS = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(9))
DOCS = Documents([40, 7, 100])


def written(pool: Any, ranks: int, output: Path, *overrides: str, steps: tuple[int, ...] = (2,)) -> list[torch.Tensor]:
    """A run in `output` with checkpoints after some steps; the logits of `IDS` after each, computed in training."""
    sizes = [f"model.config.{key}={value}" for key, value in SIZES.items()]
    sizes = [] if any(one.startswith("model.path=") for one in overrides) else sizes
    job = prepared(*sizes, "data.seq_len=147", "run.dtype=float32", f"run.output={output}", *overrides)
    write_config(job.cfg, output, job.model_config)
    cfg: Any = OmegaConf.to_container(job.cfg)
    found: list[torch.Tensor] = pool(ranks).run(_train, output, cfg, job.model_config, steps)[0]
    return found


def _train(output: Path, cfg: dict[str, Any], config: Any, steps: tuple[int, ...]) -> list[torch.Tensor]:
    mesh, lora, logits = mesh_of(dist.get_world_size(), 1), lora_of(cfg["model"]), []
    model, seed = cfg["model"], cfg["run"]["seed"]
    plain = copy.deepcopy(config)  # the engine's model will have ringattn's attention
    engine_name, stage = cfg["engine"]["name"], cfg["engine"].get("zero_stage", 0)

    def whole() -> Any:
        return build_model(copy.deepcopy(plain), seed, model["path"], model["allow_mismatch"], lora, model["freeze"])

    options = EngineOptions(
        empty=lambda: empty_model(config, lora, model["freeze"]),
        load=whole,
        stream=lambda: streamed_weights(config, seed, model["path"], lora),
        attach=lambda one: parallelize(one, mesh),
        device=mesh.device,
        dtype=torch.float32,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        eps=1e-8,
        clip=1.0,
        micro_steps=1,
        zero_stage=stage,
        states=StateSettings(weights=cfg["memory"]["weights"], moments=cfg["memory"]["moments"]),
    )
    engine, together = build_engine(engine_name, mesh, options), Together()
    try:
        for step in range(1, max(steps) + 1):
            layout = Layout(DOCS, mesh)
            ids = torch.randint(0, 300, (DOCS.total,), generator=torch.Generator().manual_seed(step))
            engine.backward(model_loss(engine.model, layout, layout.shard(ids)))
            engine.step(3e-2)
            if step in steps:
                logits.append(_logits(engine, whole()))
                state = TrainState(step, step * DOCS.total, {}, "f" * 64, engine_name, dist.get_world_size())
                snapshot = snapshot_of({STATE: engine.state()})
                write_checkpoint(Place(output / "checkpoints", 9), state, snapshot, together)
    finally:
        together.close()
    return logits


@torch.no_grad()
def _logits(engine: Any, whole: Any) -> torch.Tensor:
    names = dict(engine.model.named_parameters())
    full = {name.removeprefix("module."): _full(p) for name, p in names.items()}
    whole.load_state_dict(full, strict=False)
    found: torch.Tensor = whole.eval()(IDS).logits
    return found


def _full(p: Any) -> torch.Tensor:
    if hasattr(p, "ds_id"):  # DeepSpeed's third stage
        from deepspeed import zero

        with zero.GatheredParameters([p]):
            whole: torch.Tensor = p.detach().float().clone()
        return whole
    tensor: torch.Tensor = p.full_tensor() if hasattr(p, "full_tensor") else p
    return tensor.detach().float()


def save_tokenizer(path: Path, words: int = 30) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {
        word: number for number, word in enumerate(["<unk>", "</s>", *(f"word{n}" for n in range(words - 2))])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", model_max_length=64)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)
