"""Trees of sequences in transformers models: what is refused, and ranks without tokens or targets."""

from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from ringattn import Documents, SequenceMesh, init_mesh
from ringattn.hf import parallelize, sequence_logprobs, shard_batch, shard_trees
from ringattn.hf.tiny import read_config, tiny_config, tiny_model
from ringattn.memory.settings import MemorySettings
from ringattn.trees import Trees
from tests.hf.test_blocks import gemma3


@cache
def mesh_of(ring: int) -> SequenceMesh:
    return init_mesh(ring=ring, device_type="cpu")


def small() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config).double()


def loss_of(model: nn.Module, batch: dict) -> Tensor:
    return model(**batch).loss.detach()


def few_tokens(ring: int) -> None:
    """Fewer tokens than ranks, no target that counts, and none at all."""
    mesh, plain, model = mesh_of(ring), small(), small()
    handle = parallelize(model, mesh, MemorySettings(loss_tile=4))
    ids = torch.tensor([[3, 5]])
    wanted = torch.nn.functional.cross_entropy(plain(ids).logits[0, :1], ids[0, 1:])
    trees = Trees([[3, 5]])
    batch = shard_trees(trees, mesh)
    loss = model(**batch).loss
    torch.testing.assert_close(loss, wanted)
    (grad,) = torch.autograd.grad(loss / dist.get_world_size(), [model.lm_head.weight])
    dist.all_reduce(grad)
    torch.testing.assert_close(grad, torch.autograd.grad(wanted, [plain.lm_head.weight])[0])
    (parts,) = sequence_logprobs(model, batch, trees)
    torch.testing.assert_close(parts, -wanted[None])
    parts.sum().backward()  # on ranks without a target too
    for nothing in (Trees([[3]]), Trees([[3, 5, 6]], [0]), Trees([[], [4]])):
        batch = shard_trees(nothing, mesh)
        assert float(batch["num_items_in_batch"]) == 0
        assert loss_of(model, batch) == 0
    assert [len(one) for one in sequence_logprobs(model, shard_trees(nothing, mesh), nothing)] == [0, 0]
    halved = shard_trees(trees, mesh, items=2)
    torch.testing.assert_close(2 * loss_of(model, halved), wanted.detach())
    negative = shard_trees(Trees([[3, 5]], [-1.5]), mesh, items=1)
    torch.testing.assert_close(loss_of(model, negative), -1.5 * wanted.detach())
    handle.undo()


@pytest.mark.parametrize("ring", [1, 4])
def test_ranks_without_tokens_and_trees_without_targets(pool, ring):
    pool(ring).run(few_tokens, ring)


def sharded_by_fsdp() -> None:
    """The head's weight is whole in its own passes only: losses and log-probabilities are made in there."""
    mesh = mesh_of(2)
    sequences, weights = [[1, 2, 3, 4, 5], [1, 2, 3, 6], [1, 2, 3, 4, 7]], [1.0, 2.0, -0.5]
    trees = Trees(sequences, weights)
    plain, model = small(), small()
    parallelize(model, mesh, MemorySettings(loss_tile=2))
    for part in (*model.model.layers, model.lm_head, model):
        fully_shard(part)
    batch = shard_trees(trees, mesh)
    loss = model(**batch).loss
    (
        loss + 3 * sum(one.square().sum() for one in sequence_logprobs(model, batch, trees)) * mesh.sequence_size
    ).backward()

    alone = []
    for one in sequences:
        logits = plain(torch.tensor([one])).logits[0, :-1]
        alone.append(torch.log_softmax(logits, 1).gather(1, torch.tensor(one[1:])[:, None])[:, 0])
    wanted = -sum(a.sum() * b for a, b in zip(alone, weights, strict=True)) / trees.targets.items
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    (wanted + 3 * sum(one.square().sum() for one in alone)).backward()
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad.full_tensor(), other.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_fsdp_shards_the_head(pool):
    pool(2).run(sharded_by_fsdp)


def refusals() -> None:
    mesh, trees = mesh_of(1), Trees([[1, 2, 3], [1, 2, 4]])
    batch = shard_trees(trees, mesh)
    for memory in (None, MemorySettings(mlp_tile=8)):
        handle = parallelize(model := small(), mesh, memory)
        told = r"LlamaForCausalLM has a loss of one target for each token.*MemorySettings\(loss_tile=2048\)"
        with pytest.raises(NotImplementedError, match=told):
            model(**batch)
        with pytest.raises(NotImplementedError, match=told):
            sequence_logprobs(model, batch, trees)
        handle.undo()
    with pytest.raises(NotImplementedError, match=told):
        sequence_logprobs(model, batch, trees)  # not parallelized
    handle = parallelize(model, mesh, MemorySettings(loss_tile=8))
    other = shard_batch({"input_ids": torch.tensor([[1, 2]])}, Documents([2]), mesh)
    with pytest.raises(ValueError, match="batch must come from shard_trees"):
        sequence_logprobs(model, other, trees)
    model.model.layers[0].mixer = nn.Conv1d(16, 16, 3)
    handle._kept = {}
    with pytest.raises(
        NotImplementedError, match=r"LlamaForCausalLM has Conv1d at model\.layers\.0\.mixer, which carries"
    ):
        model(**batch)
    handle.undo()
    chunked = tiny_model(tiny_config(read_config("llama4_text")))
    handle = parallelize(chunked, mesh, MemorySettings(loss_tile=8))
    with pytest.raises(
        NotImplementedError, match=r"Llama4ForCausalLM has Llama4TextAttention at .*chunks of positions"
    ):
        chunked(**batch)
    handle.undo()
    with pytest.raises(ValueError, match="trees must be Trees, got list"):
        shard_trees([[1, 2]], mesh)
    with pytest.raises(ValueError, match="trees must hold a token, got 1 sequences of 0 tokens"):
        shard_trees(Trees([[]]), mesh)
    for weight in (-1.0, [0, 1.0, -1.0]):
        with pytest.raises(ValueError, match="must have a sum greater than 0, which the loss is divided by, got"):
            shard_trees(Trees([[1, 2, 3]], [weight]), mesh)
    for items in (0, -1, True, float("inf"), float("nan"), "1"):
        with pytest.raises(ValueError, match="items must be a number greater than 0, got"):
            shard_trees(trees, mesh, items=items)
    ids = {"input_ids": trees.tokens[None], "labels": trees.tokens[None]}
    with pytest.raises(ValueError, match=r"labels cannot be shifted along trees.*shard_trees"):
        shard_batch(ids, trees.docs, mesh)


def test_what_trees_cannot_be_given_to_is_refused(pool):
    pool(1).run(refusals)


def odd_trees() -> dict[str, list[list[int]]]:
    generator = torch.Generator().manual_seed(5)

    def some(size: int) -> list[int]:
        return torch.randint(3, 97, (size,), generator=generator).tolist()

    prompt, path, deep = some(30), some(4), []
    for _ in range(9):
        deep += [path + some(5), path + some(3)]
        path = path + some(4)
    return {
        "a completion without a token": [prompt + some(9), prompt, prompt + some(14)],
        "all equal": [[*prompt, 7, 8, 9]] * 4,
        "a prompt of one token": [[5, *some(size)] for size in (1, 12, 7, 0, 20)],
        "a branch in nine levels": deep,
        "fewer completions than ranks": [prompt + some(3), prompt + some(40)],
        "nothing to share": [[], [5], prompt, [6, 5]],
    }


def beside_documents(ring: int, family: str) -> None:
    """Loss, log-probabilities and gradients of every odd tree, against its sequences alone."""
    mesh = mesh_of(ring)
    plain, model = (tiny_model(tiny_config(read_config(family))) for _ in range(2))
    handle = parallelize(model, mesh, MemorySettings(loss_tile=8, mlp_tile=8, keep="attention"))
    for name, sequences in odd_trees().items():
        trees = Trees(sequences)
        batch = shard_trees(trees, mesh)
        loss = model(**batch).loss
        found = torch.autograd.grad(loss / dist.get_world_size(), list(model.parameters()), allow_unused=True)
        parts = sequence_logprobs(model, batch, trees)
        wanted = []
        for one in sequences:
            ids = torch.tensor(one, dtype=torch.int64)
            logits = plain(ids[None]).logits[0, :-1] if len(one) > 1 else torch.zeros(0, 97)
            wanted.append(torch.log_softmax(logits, 1).gather(1, ids[1:, None])[:, 0])
        torch.testing.assert_close(parts, tuple(wanted), rtol=1e-5, atol=1e-5, msg=name)
        alone = -torch.cat(wanted).mean()
        torch.testing.assert_close(loss, alone, rtol=1e-5, atol=1e-5, msg=name)
        exact = torch.autograd.grad(alone, list(plain.parameters()), allow_unused=True)
        for one, other, weight in zip(found, exact, plain.parameters(), strict=True):
            whole = torch.zeros_like(weight) if one is None else one.clone()
            dist.all_reduce(whole)
            truth = torch.zeros_like(weight) if other is None else other
            assert (whole - truth).norm() <= 1e-5 * truth.norm().clamp_min(1e-3), name
    handle.undo()


@pytest.mark.parametrize(
    ("family", "ring"),
    [("gpt_oss", 1), ("gpt_oss", 4), ("gemma2", 1), pytest.param("gemma2", 4, marks=pytest.mark.slow)],
)
def test_odd_trees_are_their_sequences_alone(pool, ring, family):
    """Beside windows and sinks, and beside capped scores."""
    pool(ring).run(beside_documents, ring, family)


def with_image_tokens() -> None:
    mesh = mesh_of(2)
    parallelize(model := gemma3(), mesh, MemorySettings(loss_tile=8))
    token = model._ringattn.needs.towers[0].token
    model(**shard_trees(Trees([[1, 2, 3], [1, 2, 4]]), mesh))
    model(**shard_trees(Trees([[1, 2, token, 3], [1, 2, 4]]), mesh))


def test_image_tokens_on_trees_are_refused_on_both_ranks(pool):
    with pytest.raises(NotImplementedError, match=r"trees have tokens of images \(100\)") as refusal:
        pool(2).run(with_image_tokens)
    assert "failed too" in str(refusal.value.__cause__)
