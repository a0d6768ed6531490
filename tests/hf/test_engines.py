"""Around a parallelized model: Accelerate with FSDP2, PEFT's LoRA, TRL's SFTTrainer; skipped where they are absent."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

from ringattn.hf import parallelize, shard_batch
from ringattn.hf.conformance import FORMS, alone
from ringattn.hf.tiny import read_config, tiny_config, tiny_model
from tests.hf.families import GQA
from tests.parallel.ranks import mesh_of
from tests.pool import Pools

FORM = FORMS[4]  # packed, padded tail


def model_of(family: str = "qwen3") -> Any:
    return tiny_model(tiny_config(read_config(family), **GQA))


def local_batch(ring: int = 2) -> dict[str, Any]:
    return shard_batch(FORM.batch(97), None, mesh_of(ring, 1), "zigzag")


def fully_sharded(checkpointing: bool) -> tuple[float, dict[str, torch.Tensor], float, dict[str, torch.Tensor]]:
    """Loss and gradients of Accelerate's FSDP2, and of documents alone."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from torch.distributed.tensor import DTensor

    model = model_of()
    truth = alone(model, FORM)
    model.zero_grad()
    parallelize(model, mesh_of(2, 1))
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen3DecoderLayer"],
        activation_checkpointing=checkpointing,
    )
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # Accelerate takes FSDP for GPUs only; what it does with a model works on CPUs as well.
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    loss = model(**local_batch()).loss
    accelerator.backward(loss)
    gradients = {}
    for name, p in model.named_parameters():
        assert isinstance(p.grad, DTensor), name
        gradients[name.replace("_checkpoint_wrapped_module.", "")] = p.grad.full_tensor()
    accelerator.free_memory()
    AcceleratorState._reset_state(True)
    return loss.item(), gradients, truth.loss.item(), truth.gradients


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_under_accelerates_fsdp2_are_exact(pool: Pools, checkpointing: bool) -> None:
    pytest.importorskip("accelerate", reason="Accelerate is not installed (pip install 'ringattn[hf]')")
    for loss, gradients, true_loss, truth in pool(2).run(fully_sharded, checkpointing):
        assert loss == pytest.approx(true_loss, rel=1e-5)
        assert set(gradients) == set(truth)
        for name, expected in truth.items():
            assert (gradients[name] - expected).norm() <= 1e-5 * expected.norm(), name


def low_rank() -> tuple[float, dict[str, torch.Tensor], float, dict[str, torch.Tensor]]:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)  # the factors are drawn here, and must be the same on every rank
    model = get_peft_model(
        model_of(), LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], lora_dropout=0.0)
    )
    for name, p in model.named_parameters():
        if "lora_B" in name:  # zero at first: then the gradient of the other factor would be zero too
            torch.nn.init.normal_(p, std=0.1)
    truth = alone(model.eval(), FORM)
    model.zero_grad()
    handle = parallelize(model, mesh_of(2, 1))
    output = model(**local_batch())
    output.loss.backward()
    assert handle.verified
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for gradient in gradients.values():
        dist.all_reduce(gradient)
        gradient /= 2
    return output.loss.item(), gradients, truth.loss.item(), truth.gradients


def test_gradients_of_lora_are_exact(pool: Pools) -> None:
    pytest.importorskip("peft", reason="PEFT is not installed (pip install 'ringattn[hf]')")
    for loss, gradients, true_loss, truth in pool(2).run(low_rank):
        assert loss == pytest.approx(true_loss, rel=1e-5)
        assert len(gradients) == 4 * 4 * 2
        for name, expected in truth.items():
            assert (gradients[name] - expected).norm() <= 1e-5 * expected.norm(), name


def low_rank_on_bfloat16(ring: int) -> tuple[float, torch.dtype]:
    """LoRA on bfloat16 weights with float32 norms and adapters, under autocast, as k-bit training prepares models."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(model_of().bfloat16(), use_gradient_checkpointing=False)
    model.is_loaded_in_8bit = False
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    seen = []
    parallelize(model, mesh_of(ring, 1))
    inner = model.get_base_model().model.layers[0].self_attn.o_proj
    inner.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**local_batch(ring)).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    return loss.item(), seen[0]


def test_lora_on_bfloat16_with_float32_norms_rounds_as_one_rank_does(pool: Pools) -> None:
    pytest.importorskip("peft", reason="PEFT is not installed (pip install 'ringattn[hf]')")
    loss, dtype = pool(2).run(low_rank_on_bfloat16, 2)[0]
    assert dtype == torch.bfloat16
    assert loss == pytest.approx(pool(1).run(low_rank_on_bfloat16, 1)[0][0], rel=1e-4)


def fine_tuned(folder: str, ring: int) -> list[float]:
    """Losses of TRL's SFTTrainer, packing by best fit, on the ranks of a ring."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from ringattn.hf.trainer import OnMesh

    class Mine(OnMesh, SFTTrainer):
        pass

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 30, (60,), generator=generator).tolist()
    rows = [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]
    arguments = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=4,
        learning_rate=3e-3,
        logging_steps=1,
        max_length=48,
        packing=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        seed=1,
    )
    trainer = Mine(
        model_of(),
        arguments,
        mesh=mesh_of(ring, 1),
        policy="zigzag",
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=_tokenizer(),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{n}": n for n in range(3, 97)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


@pytest.mark.slow
def test_trls_packing_trains_as_one_rank_does(pool: Pools, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    alone = pool(1).run(fine_tuned, str(tmp_path / "1"), 1)[0]
    assert len(alone) == 4
    for losses in pool(2).run(fine_tuned, str(tmp_path / "2"), 2):
        assert losses == pytest.approx(alone, rel=2e-5)
