"""Errors of a loss in tiles against float64: ours, torch's `F.linear_cross_entropy` and liger-kernel's, where they are.

    python benchmarks/tiles.py --tiles 1,32,1024
    python benchmarks/tiles.py --tokens 8192 --size 64 --words 65536    liger's with 1,024 tiles as well

Error = ‖x − reference‖ / ‖reference‖ of the summed loss and of the gradients of hidden states and head; bfloat16
inputs, every seventh target ignored, float64 reference from the same inputs. torch has it from 2.13 on, liger only on
GPUs, where it takes as many tiles as the words are times the size, and has no row for other numbers.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ringattn.memory.tiled_loss import tiled_loss

Loss = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, tiles: int) -> Tensor:
    return tiled_loss(hidden, weight, targets, tile=-(-len(hidden) // tiles))


def torchs(hidden: Tensor, weight: Tensor, targets: Tensor, tiles: int) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=-(-len(hidden) // tiles), acc_dtype=torch.float32)
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)


def ligers(accumulated: torch.dtype | None) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, tiles: int) -> Tensor:
        from liger_kernel.ops import fused_linear_cross_entropy as made

        if tiles != tiles_of_liger(*hidden.shape, len(weight)):
            raise NotImplementedError(f"liger does not take {tiles} tiles here")
        made.MAX_FUSED_SIZE = weight.shape[0]
        found = made.LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, targets, None, None, -100, 0.0, 0.0, "sum", None, False, accumulated
        )
        return found[0] if isinstance(found, tuple) else found

    return loss


def tiles_of_liger(tokens: int, size: int, words: int) -> int:
    """A tile's logits are to be no more than the hidden states; tokens of a tile are a power of two."""
    tile = 1 << max(0, -(-tokens // -(-words // size)) - 1).bit_length()
    return -(-tokens // tile)


def contestants(device: str) -> dict[str, Loss]:
    found: dict[str, Loss] = {"ringattn": ours}
    if hasattr(F, "linear_cross_entropy"):
        found["torch"] = torchs
    if device == "cuda":
        found |= {"liger": ligers(None), "liger, float32 sums": ligers(torch.float32)}
    return found


def errors(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor], tiles: int, right: list[Tensor]) -> list[float]:
    hidden, weight = (x.clone().requires_grad_() for x in inputs[:2])
    found = loss(hidden, weight, inputs[2], tiles)
    found.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    values = found.detach(), hidden.grad, weight.grad
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(values, right, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", default="1,32,1024", help="numbers of tiles")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--size", type=int, default=256, help="of a hidden state")
    parser.add_argument("--words", type=int, default=4096)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    hidden = torch.randn(options.tokens, options.size, device=device).bfloat16()
    weight = (torch.randn(options.words, options.size, device=device) / options.size**0.5).bfloat16()
    targets = torch.randint(0, options.words, (options.tokens,), device=device)
    targets[::7] = -100
    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    loss = F.cross_entropy(x @ w.T, targets, reduction="sum")
    loss.backward()
    assert x.grad is not None
    assert w.grad is not None
    right = [loss.detach(), x.grad, w.grad]
    print(f"torch {torch.__version__} on {device}\n")
    print("| | tiles | loss | gradient of hidden states | gradient of the head |")
    print("|---|---|---|---|---|")
    for name, one in contestants(device).items():
        for tiles in map(int, options.tiles.split(",")):
            try:
                found = errors(one, (hidden, weight, targets), tiles, right)
            except NotImplementedError:
                continue
            print(f"| {name} | {tiles:,} | {found[0]:.2e} | {found[1]:.2e} | {found[2]:.2e} |", flush=True)


if __name__ == "__main__":
    main()
