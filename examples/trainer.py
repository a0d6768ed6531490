"""transformers' Trainer on a mesh: the arguments, data set and callbacks of any other Trainer, with long rows shared.

torchrun --nproc-per-node 2 examples/trainer.py
"""

import tempfile

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from ringattn import init_mesh
from ringattn.hf.trainer import SequenceTrainer
from ringattn.memory.settings import MemorySettings

STEPS = 30


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)  # the same weights on every rank
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config)


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    """Rows that count upwards, each from a start of its own."""
    made = [(torch.arange(200) + 7 * number) % 64 for number in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in made]


def main() -> None:
    mesh = init_mesh()  # parallel over data too: init_mesh(data=4, ring=2) makes four replicas of two ranks
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=2,  # rows of a replica, which its ranks share
            max_steps=STEPS,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            logging_steps=10,
            logging_first_step=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=mesh.device_type == "cpu",
        )
        memory = MemorySettings(loss_tile=128)  # no more than 128 tokens' logits at a time
        trainer = SequenceTrainer(make_model(), arguments, mesh=mesh, memory=memory, train_dataset=rows(64))
        trainer.train()
        trainer.evaluate(rows(3))  # the exact mean over all targets
        dist.barrier()
    mesh.close()


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
