"""A Hugging Face model trained on packed documents that two ranks share.

    torchrun --nproc-per-node 2 examples/hugging_face.py

The model is tiny and its weights are random, so that nothing has to be downloaded; `from_pretrained` instead of
`make_model` is all that a real one needs.
"""

import torch
import torch.distributed as dist
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


def make_batch() -> tuple[dict[str, torch.Tensor], Documents]:
    """Three documents that count upwards, from another start each: next tokens that can be learned in seconds."""
    docs = Documents([200, 70, 130])
    ids = torch.cat([(torch.arange(length) + 7 * length) % 64 for length in docs.lengths])[None]
    return {"input_ids": ids, "labels": ids}, docs


def main() -> None:
    mesh = init_mesh()
    model = make_model().to(mesh.device)

    # From here on the model attends over the ranks of the mesh. What cannot be exact is refused here, by name.
    parallelize(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        # The same global batch on every rank; shard_batch keeps this rank's tokens, with their positions and targets.
        # (A real loop has another batch in every step, and no rank needs to know more than its documents' lengths.)
        whole, docs = make_batch()
        batch = {name: value.to(mesh.device) for name, value in whole.items()}
        loss = model(**shard_batch(batch, docs, mesh)).loss  # the mean over all targets, equal on every rank
        loss.backward()
        if dist.get_world_size() > 1:
            # Gradients are averaged, which FSDP, DDP and DeepSpeed do by themselves.
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        optimizer.step()
        optimizer.zero_grad()
        if mesh.sequence_rank == 0 and (step % 10 == 0 or step == STEPS - 1):
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    mesh.close()


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
