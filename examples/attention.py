"""Attention over packed documents, split over ranks, and the same attention on one of them.

torchrun --nproc-per-node 2 examples/attention.py
"""

import torch
import torch.distributed as dist

from ringattn import Documents, Layout, Mask, MeshShape, ParallelAttention, init_mesh, parallel_attention

HEADS, KEY_HEADS, HEAD_DIM = 8, 2, 32


def main() -> None:
    # All ranks share one sequence, as a ring. init_mesh joins the process group that torchrun prepared; alone it makes
    # a mesh of one rank.
    mesh = init_mesh()

    # A packed batch: documents of any lengths, end to end in one stream. Nothing is padded, and no length has to divide
    # by the number of ranks.
    docs = Documents([1_500, 3, 0, 700, 345])
    layout = Layout(docs, mesh)
    print(f"rank {mesh.sequence_rank} holds {layout.tokens()} of {docs.total} tokens: {layout.ranges()}", flush=True)

    # The whole stream, which a real model would never have on one rank: here to compare with. The same seed on every
    # rank draws the same numbers.
    torch.manual_seed(0)
    stream = [
        torch.randn(docs.total, heads, HEAD_DIM, device=mesh.device, dtype=dtype_of(mesh.device_type))
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]

    # This rank's tokens, in the order of the layout.
    q, k, v = (layout.shard(x).requires_grad_() for x in stream)
    attention = ParallelAttention(mesh, mask=Mask(window=(256, 0)))
    out = attention(q, k, v, layout)  # collective: every rank calls it
    out.square().sum().backward()

    # One rank alone over the whole stream. A MeshShape is a mesh without processes.
    whole = [x.clone().requires_grad_() for x in stream]
    alone = parallel_attention(*whole, Layout(docs, MeshShape()), mask=Mask(window=(256, 0)))
    alone.square().sum().backward()

    for name, ours, theirs in (
        ("output", out, alone),
        ("gradient of q", q.grad, whole[0].grad),
        ("gradient of k", k.grad, whole[1].grad),
        ("gradient of v", v.grad, whole[2].grad),
    ):
        error = (ours - layout.shard(theirs)).norm() / theirs.norm()
        print(f"rank {mesh.sequence_rank}: {name} differs by {error:.1e}", flush=True)
    mesh.close()


def dtype_of(device_type: str) -> torch.dtype:
    """What flash kernels take: bfloat16 on GPUs; on CPUs float32."""
    return torch.bfloat16 if device_type == "cuda" else torch.float32


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
