"""transformers models under torch.compile, used as the Trainer does: nobody keeps a batch until backward."""

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate (pip install 'ringattn[hf]')")

from ringattn.hf import parallelize, shard_batch
from ringattn.hf.tiny import read_config, tiny_config, tiny_model
from tests.parallel.ranks import mesh_of
from tests.pool import Pools


def small(layers: int) -> Any:
    return tiny_model(tiny_config(read_config("llama"), num_hidden_layers=layers, num_key_value_heads=2))


def rows() -> list[dict[str, Any]]:
    """Of one length, so that few graphs are compiled."""
    ids = torch.randint(3, 97, (4, 24), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "labels": row, "seq_idx": [0] * 15 + [1] * 9} for row in ids]


def trained(folder: str, compiled: bool) -> list[float]:
    """Losses of 2 steps of 2 micro-batches, whose layers are computed again in the backward pass."""
    from transformers import TrainingArguments

    from ringattn.hf.trainer import SequenceTrainer

    torch._dynamo.reset()
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        max_steps=2,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        torch_compile=compiled,
        torch_compile_backend="aot_eager" if compiled else None,
    )
    trainer = SequenceTrainer(small(1), arguments, mesh=mesh_of(2, 1), train_dataset=rows(), data_collator=tensors)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def tensors(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([feature[name] for feature in features]) for name in features[0]}


@pytest.mark.nightly
def test_the_trainers_torch_compile(pool: Pools, tmp_path: Any) -> None:
    plain, compiled = pool(2).run_many(trained, [(str(tmp_path), False), (str(tmp_path), True)], timeout=300.0)
    for losses, expected in zip(compiled, plain, strict=True):
        assert len(losses) == 2
        assert losses == pytest.approx(expected, rel=2e-5)


def dropped() -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Gradients of a model whose layers are compiled one by one, and of the same without, batch after batch."""
    torch._dynamo.reset()
    mesh, model = mesh_of(2, 1), small(1)
    parallelize(model, mesh)
    results = []
    for compiled in (False, True):
        if compiled:
            for layer in model.model.layers:
                layer.compile(backend="aot_eager", fullgraph=True)
        batches = []
        for size in (30, 21):
            ids = torch.randint(3, 97, (1, size), generator=torch.Generator().manual_seed(size))
            loss = model(**shard_batch({"input_ids": ids, "labels": ids}, None, mesh)).loss
            loss.backward()
            batches.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
            model.zero_grad()
        results.append(batches)
    return list(zip(*results, strict=True))


@pytest.mark.nightly
def test_layers_compiled_one_by_one_without_their_batch(pool: Pools) -> None:
    for batches in pool(2).run(dropped, timeout=300.0):
        for plain, compiled in batches:
            for a, b in zip(plain, compiled, strict=True):
                torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-7)
