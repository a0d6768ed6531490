"""A step of attention as a CUDA graph: the host issues it once, and the GPU replays it.

    torchrun --nproc-per-node 2 examples/captured_step.py

Short documents take the GPU less time than the host needs to launch their kernels. A captured step has no host in it.
It stands for one pack of documents: the lengths, and the addresses of all tensors, stay as they were captured.
"""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from ringattn import Documents, Layout, ParallelAttention, init_mesh

STEPS = 20


def main() -> None:
    if not torch.cuda.is_available():
        print("a CUDA graph needs a GPU, and this machine has none: nothing was captured")
        return
    mesh = init_mesh(captured=True)  # plans are made as if the host took no time
    docs = Documents([300] * 12 + [1_000] * 2)
    layout = Layout(docs, mesh)  # the graph reads its tables, so it must be kept
    attention = ParallelAttention(mesh)
    q, k, v, dout = (
        torch.randn(layout.tokens(), heads, 128, device=mesh.device, dtype=torch.bfloat16) for heads in (32, 8, 8, 32)
    )
    inputs = tuple(x.requires_grad_() for x in (q, k, v))

    def step() -> tuple[torch.Tensor, ...]:
        out = attention(*inputs, layout)
        return out, *torch.autograd.grad(out, inputs, dout)

    # Once outside of the capture, on the stream of the capture: this makes tables and message buffers and compiles
    # kernels, none of which may happen in a capture.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        eager = [x.clone() for x in step()]
    torch.cuda.synchronize()

    graph = torch.cuda.CUDAGraph()
    # "thread_local": NCCL's watchdog asks for events meanwhile, on a thread of its own.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        captured = step()  # these tensors hold the results of every replay
    graph.replay()  # in the same order on all ranks
    torch.cuda.synchronize()
    differ = max((ours - theirs).abs().max().item() for ours, theirs in zip(captured, eager, strict=True))
    print(f"rank {mesh.sequence_rank}: the replay differs from the eager step by {differ:.1e} at most")
    with torch.cuda.stream(stream):
        eager_ms, captured_ms = (seconds(run) * 1e3 for run in (step, graph.replay))
    print(f"rank {mesh.sequence_rank}: eager {eager_ms:.2f} ms, captured {captured_ms:.2f} ms")
    mesh.close()
    dist.destroy_process_group()


def seconds(run: Callable[[], object]) -> float:
    """A step's time, over several that follow one another."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(STEPS):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / STEPS


if __name__ == "__main__":
    main()
