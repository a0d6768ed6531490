"""Models on trees of completions against the same model on each sequence alone: loss, gradients, log-probabilities."""

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ringattn import Layout, ParallelAttention, SequenceMesh, init_mesh
from ringattn.hf import parallelize, sequence_logprobs, shard_trees
from ringattn.memory.settings import MemorySettings
from ringattn.memory.tiled_logprobs import tiled_logprobs
from ringattn.memory.tiled_loss import tiled_loss
from ringattn.trees import Trees

WORDS, SIZE, HEADS = 53, 32, 4
WINDOW = 16  # tokens, of families that have one: shorter than the prompt, and than some completions
APART = 10**9  # so much is never shared: the same sequences as documents of their own


@cache
def mesh_of(ring: int, ulysses: int) -> SequenceMesh:
    return init_mesh(ring=ring, ulysses=ulysses, device_type="cpu")


def completions(prompt: int, longest: int = 40, count: int = 8) -> tuple[list[list[int]], list[list[float]]]:
    """Completions of one prompt whose first tokens all differ, and one that goes on from inside of another; the prompt
    is not learned, and advantages have both signs."""
    generator = torch.Generator().manual_seed(prompt)
    shared = torch.randint(0, WORDS, (prompt,), generator=generator).tolist()
    sequences, weights = [], []
    for number in range(count):
        size = int(torch.randint(1, longest, (), generator=generator))
        own = torch.randint(0, WORDS, (size,), generator=generator).tolist()
        sequences.append([*shared, number, *own])
        weights.append([0.0] * prompt + [(1.0, 0.5, -0.25)[number % 3]] * (size + 1))
    sequences.append([*sequences[0][: prompt + 1], WORDS - 1, 3])
    weights.append([0.0] * prompt + [0.0, 2.0, 1.0])
    return sequences, weights


def ratios(parts: tuple[Tensor, ...] | list[Tensor], weights: list[list[float]]) -> Tensor:
    """A clipped objective, which is no weighted sum of log-probabilities."""
    total = parts[0].new_zeros(())
    for one, weight in zip(parts, weights, strict=True):
        own = torch.tensor(weight[1:], dtype=one.dtype)
        ratio = torch.exp(one + 4)
        total = total - torch.minimum(ratio * own, ratio.clamp(0.8, 1.2) * own).sum()
    return total / 100


class Own(nn.Module):
    """A model of one's own: an attention, an MLP, and a head."""

    def __init__(self, mesh: SequenceMesh, options: dict[str, Any]) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(WORDS, SIZE), nn.Linear(SIZE, WORDS)
        self.qkv = nn.ModuleList(nn.Linear(SIZE, 3 * SIZE) for _ in range(2))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(SIZE, SIZE), nn.GELU()) for _ in range(2))
        self.attention = ParallelAttention(mesh, **options)

    def forward(self, ids: Tensor, positions: Tensor, layout: Layout | None) -> Tensor:
        """Hidden states (t, E). Without a layout of one sequence alone, by torch's own attention."""
        angles = positions[:, None].to(self.head.weight.dtype) / 100 ** torch.linspace(0, 1, SIZE)
        x = self.embedding(ids) + angles.sin()
        for qkv, mlp in zip(self.qkv, self.mlp, strict=True):
            q, k, v = qkv(F.layer_norm(x, (SIZE,))).view(len(x), 3, HEADS, -1).unbind(1)
            if layout is None:
                mixed = F.scaled_dot_product_attention(*(y.transpose(0, 1)[None] for y in (q, k, v)), is_causal=True)
                mixed = mixed[0].transpose(0, 1)
            else:
                mixed = self.attention(q.contiguous(), k.contiguous(), v.contiguous(), layout)
            x = x + mixed.flatten(1)
            x = x + mlp(F.layer_norm(x, (SIZE,)))
        return x


def tiny(family: str, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=WORDS, hidden_size=SIZE, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=2, head_dim=8, max_position_embeddings=8192,
        sliding_window=WINDOW,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).to(dtype)


def parameters_of(model: nn.Module) -> list[Tensor]:
    return [one for one in model.parameters() if one.requires_grad]


def summed(gradients: Any, model: nn.Module, mesh: SequenceMesh) -> list[Tensor]:
    """Gradients of all ranks' tokens."""
    out = []
    for grad, one in zip(gradients, parameters_of(model), strict=True):
        whole = torch.zeros_like(one) if grad is None else grad.clone()
        dist.all_reduce(whole, group=mesh.sequence_group)
        out.append(whole)
    return out


def check(found: Any, wanted: Any, tolerance: float, what: str) -> None:
    """Relative to the norm of what is wanted."""
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        error = (one.double() - other.double()).norm() / other.double().norm().clamp_min(1e-3)
        assert error <= tolerance, f"{what} {number}: off by {float(error):.2e}"


def log_probs_alone(logits: Tensor, sequence: list[int]) -> Tensor:
    return F.log_softmax(logits[:-1], -1).gather(1, torch.tensor(sequence[1:])[:, None])[:, 0]


def own_model(
    ring: int, ulysses: int, case: tuple[int, int], dtype: torch.dtype, tolerance: float, options: dict[str, Any]
) -> None:
    """In every rank: a model of one's own on trees, against separate sequences on the first rank alone."""
    prompt, min_shared = case
    mesh = mesh_of(ring, ulysses)
    torch.manual_seed(0)
    model = Own(mesh, options).to(dtype)
    sequences, weights = completions(prompt)
    trees = Trees(sequences, weights, min_shared=min_shared)
    layout = Layout(trees.docs, mesh)
    assert torch.equal(layout.position_ids(), layout.shard(trees.positions))
    local = trees.targets.shard(layout)

    hidden = model(layout.shard(trees.tokens), layout.position_ids(), layout)
    head = {"bias": model.head.bias, "tile": 16}
    loss = tiled_loss(hidden, model.head.weight, local, scale=1 / trees.targets.items, **head)
    parts = trees.by_sequence(tiled_logprobs(hidden, model.head.weight, local, **head), layout)
    gradients = torch.autograd.grad(loss, parameters_of(model), retain_graph=True, allow_unused=True)
    of_ratios = torch.autograd.grad(ratios(parts, weights), parameters_of(model), allow_unused=True)
    dist.all_reduce(loss := loss.detach().clone(), group=mesh.sequence_group)
    gradients, of_ratios = summed(gradients, model, mesh), summed(of_ratios, model, mesh)
    if dist.get_rank():
        return

    alone = [
        log_probs_alone(model.head(model(torch.tensor(one), torch.arange(len(one)), None)), one) for one in sequences
    ]
    times = [torch.tensor(one[1:], dtype=dtype) for one in weights]
    wanted = -sum((a * b).sum() for a, b in zip(alone, times, strict=True)) / sum(float(one.sum()) for one in times)
    check([loss], [wanted], tolerance, "loss")
    check(parts, alone, tolerance, "log-probabilities of sequence")
    exact = torch.autograd.grad(wanted, parameters_of(model), retain_graph=True)
    check(gradients, exact, tolerance, "gradient")
    exact = torch.autograd.grad(ratios(alone, weights), parameters_of(model))
    check(of_ratios, exact, tolerance, "gradient of clipped ratios")


def hugging_face(
    ring: int,
    ulysses: int,
    case: tuple[int, int],
    dtype: torch.dtype,
    tolerance: float,
    options: dict[str, Any],
    family: str = "llama",
) -> None:
    """In every rank: a model through `parallelize` on trees, against the plain one on each sequence in the first."""
    prompt, min_shared = case
    mesh = mesh_of(ring, ulysses)
    plain, model = tiny(family, dtype), tiny(family, dtype)
    sequences, weights = completions(prompt)
    trees = Trees(sequences, weights, min_shared=min_shared)
    handle = parallelize(model, mesh, MemorySettings(loss_tile=16), **options)
    batch = shard_trees(trees, mesh)
    loss = model(**batch).loss
    # Engines average over ranks, so that gradients are scaled by their number.
    gradients = torch.autograd.grad(loss / dist.get_world_size(), parameters_of(model))
    parts = sequence_logprobs(model, batch, trees)
    of_ratios = torch.autograd.grad(ratios(parts, weights), parameters_of(model))
    gradients, of_ratios = summed(gradients, model, mesh), summed(of_ratios, model, mesh)
    handle.undo()
    if dist.get_rank():
        return

    alone = [log_probs_alone(plain(torch.tensor([one])).logits[0], one) for one in sequences]
    times = [torch.tensor(one[1:], dtype=dtype) for one in weights]
    wanted = -sum((a * b).sum() for a, b in zip(alone, times, strict=True)) / sum(float(one.sum()) for one in times)
    check([loss], [wanted], tolerance, "loss")
    check(parts, alone, tolerance, "log-probabilities of sequence")
    exact = torch.autograd.grad(wanted, parameters_of(plain), retain_graph=True)
    check(gradients, exact, tolerance, "gradient")
    exact = torch.autograd.grad(ratios(alone, weights), parameters_of(plain))
    check(of_ratios, exact, tolerance, "gradient of clipped ratios")


MESHES = {1: (1, 1), 2: (2, 1), 4: (2, 2)}


@pytest.mark.parametrize("size", MESHES)
@pytest.mark.parametrize("min_shared", [1, APART], ids=["shared", "apart"])
@pytest.mark.parametrize("model", [own_model, hugging_face])
def test_trees_are_separate_sequences(pool, size, min_shared, model):
    # Llama's norms compute in float32 whatever the model's dtype.
    exact = (torch.float64, 1e-11 if model is own_model else 1e-6, {"backend": "reference"})
    usual = (torch.float32, 1e-5, {})
    pool(size).run_many(model, [(*MESHES[size], (120, min_shared), *numbers) for numbers in (exact, usual)])


@pytest.mark.parametrize("size", [1, 4])
def test_windows_reach_back_along_the_way_of_a_sequence(pool, size):
    """Mistral's window in every layer, and Gemma 2's in every other one, beside its capped logits."""
    for family in ("mistral", "gemma2"):
        pool(size).run(hugging_face, *MESHES[size], (120, 1), torch.float32, 1e-5, {}, family)


@pytest.mark.nightly
@pytest.mark.parametrize(("size", "degrees"), [(1, (1, 1)), (2, (1, 2)), (4, (4, 1))])
@pytest.mark.parametrize("model", [own_model, hugging_face])
def test_completions_of_a_long_prompt(pool, size, degrees, model):
    pool(size).run(model, *degrees, (4096, 1), torch.float32, 1e-5, {}, timeout=250)
