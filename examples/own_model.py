"""A model of one's own under FSDP2, in a loop of one's own: the packer, ringattn's attention, and the loss in tiles.

torchrun --nproc-per-node 2 examples/own_model.py

As in torchtitan the model is plain PyTorch, and the loop shards it block by block. Nothing of the recipe is needed.
"""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from ringattn import Layout, ParallelAttention, init_mesh
from ringattn.memory.tiled_loss import tiled_loss
from ringattn.training.data.corpus import corpus_of
from ringattn.training.packs.packing import Packer, read_pack

WORDS, SIZE, HEADS, LAYERS = 64, 64, 4, 2
SEQ_LEN, STEPS = 512, 30


class Block(nn.Module):
    def __init__(self, attention: ParallelAttention) -> None:
        super().__init__()
        self.attention = attention
        self.norms = nn.ModuleList(nn.RMSNorm(SIZE) for _ in range(2))
        self.qkv, self.out = nn.Linear(SIZE, 3 * SIZE, bias=False), nn.Linear(SIZE, SIZE, bias=False)
        self.mlp = nn.Sequential(nn.Linear(SIZE, 4 * SIZE), nn.GELU(), nn.Linear(4 * SIZE, SIZE))

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).view(len(x), 3, HEADS, -1).unbind(1)  # (t, H, D): this rank's tokens
        mixed = self.attention(rotated(q, rotary), rotated(k, rotary), v.contiguous(), layout)
        x = x + self.out(mixed.flatten(1))
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    def __init__(self, attention: ParallelAttention) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(WORDS, SIZE), nn.RMSNorm(SIZE)
        self.blocks = nn.ModuleList(Block(attention) for _ in range(LAYERS))
        self.head = nn.Linear(SIZE, WORDS, bias=False)

    def forward(self, ids: Tensor, targets: Tensor, layout: Layout) -> Tensor:
        """The sum of this rank's losses. It is made in here, where FSDP has gathered the head."""
        positions = layout.position_ids(ids.device)  # in the document, wherever its tokens are
        angles = positions[:, None] / 10_000 ** torch.linspace(0, 1, SIZE // HEADS // 2, device=ids.device)
        x, rotary = self.embedding(ids), (angles.cos()[:, None], angles.sin()[:, None])
        for block in self.blocks:
            x = block(x, rotary, layout)
        return tiled_loss(self.norm(x), self.head.weight, targets, tile=128)


def rotated(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    (left, right), (cos, sin) = x.chunk(2, -1), rotary
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def main() -> None:
    mesh = init_mesh()  # ranks of data × ring × ulysses; here all of them share each sequence
    torch.manual_seed(0)  # the same weights on every rank
    model = Model(ParallelAttention(mesh)).to(mesh.device)
    for part in (*model.blocks, model):
        fully_shard(part)  # over all ranks, those of a sequence too: each has gradients of its own tokens
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    # Documents that count upwards. The packer cuts an endless, shuffled stream of them in packs; no target is lost.
    lengths = np.random.default_rng(0).integers(5, 300, 200)
    corpus = corpus_of([(np.arange(n, dtype=np.uint8) + n) % WORDS for n in lengths], WORDS)
    packer = Packer(corpus, SEQ_LEN, seed=0)  # packer.position goes on from a checkpoint
    for step in range(STEPS):
        pack = read_pack(packer.next(), corpus)  # the same on every rank of the sequence; replicas take one each
        layout = Layout(pack.docs, mesh)
        ids, targets = (layout.shard(x).to(mesh.device) for x in (pack.tokens, pack.labels))
        share = model(ids, targets, layout) / pack.targets
        (share * dist.get_world_size()).backward()  # FSDP averages gradients; these are to be added up
        optimizer.step()
        optimizer.zero_grad()
        loss = share.detach().clone()
        dist.all_reduce(loss)
        if dist.get_rank() == 0 and (step % 10 == 0 or step == STEPS - 1):
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    mesh.close()


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
