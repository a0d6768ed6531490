"""A loop of Accelerate's, its batches shared by two ranks.

    torchrun --nproc-per-node 2 examples/with_accelerate.py

Two things are ringattn's: `parallelize` before `prepare`, and `shard_batch` on each batch. The data loader stays out of
`prepare`, which would give each rank batches of its own: ranks of a sequence take the same ones.
"""

import torch
import torch.distributed as dist
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from ringattn import Documents, init_mesh
from ringattn.hf import parallelize, shard_batch

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


def documents(step: int) -> list[torch.Tensor]:
    """Three that count upwards, of other lengths in every step."""
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(20, 200, (3,), generator=generator).tolist()
    return [(torch.arange(length) + 7 * length) % 64 for length in lengths]


def collated(batch: list[list[torch.Tensor]]) -> tuple[dict[str, torch.Tensor], Documents]:
    """The documents of a batch end to end: nothing is padded, and labels are not shifted."""
    whole = [document for documents in batch for document in documents]
    ids = torch.cat(whole)[None]
    return {"input_ids": ids, "labels": ids}, Documents([len(document) for document in whole])


def main() -> None:
    mesh = init_mesh()
    accelerator = Accelerator(cpu=mesh.device_type == "cpu")
    model = make_model()
    parallelize(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer = accelerator.prepare(model, optimizer)  # DDP, or FSDP2 as Accelerate is configured
    loader = torch.utils.data.DataLoader([documents(step) for step in range(STEPS)], batch_size=1, collate_fn=collated)
    for step, (batch, docs) in enumerate(loader):
        batch = {name: value.to(accelerator.device) for name, value in batch.items()}
        loss = model(**shard_batch(batch, docs, mesh)).loss  # the mean over all targets, equal on every rank
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == STEPS - 1:
            accelerator.print(f"step {step}: loss {loss.item():.3f}")
    accelerator.free_memory()
    mesh.close()


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
