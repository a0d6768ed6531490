"""Hugging Face models: every document run alone is the truth, not transformers' own packing."""

import pytest
import torch
import torch.distributed as dist

from ringattn import Documents, init_mesh
from ringattn.hf import parallelize, shard_batch
from ringattn.hf.tiny import read_config, tiny_config
from tests.parallel.ranks import mesh_of
from tests.pool import Pools

transformers = pytest.importorskip("transformers")
DOCS = Documents([5, 4, 0, 37, 1, 20])
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WINDOW = {"sliding_window": 6}
FAMILIES = {
    "LlamaForCausalLM": {},
    "Qwen3ForCausalLM": {"head_dim": 16},
    "MistralForCausalLM": WINDOW,
    "Qwen2ForCausalLM": WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
    "Gemma2ForCausalLM": WINDOW | {"head_dim": 16, "attn_logit_softcapping": 2.0},
}


def model_of(family: str, **changes: object) -> torch.nn.Module:
    model_class = getattr(transformers, family)
    config = model_class.config_class(**{**SIZES, **FAMILIES[family], **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = model_class(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.12)  # the default is so small that features hardly show
    return model.eval()


def alone(family: str, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Logits (T, vocabulary), mean loss over all targets and gradients, one document after another."""
    model = model_of(family)
    logits, losses, targets = [], [], 0
    for start, size in zip(DOCS.starts, DOCS.lengths, strict=True):
        if not size:
            continue
        part = model(input_ids=ids[None, start : start + size], use_cache=False).logits[0]
        logits.append(part.detach())
        losses.append(torch.nn.functional.cross_entropy(part[:-1], ids[start + 1 : start + size], reduction="sum"))
        targets += size - 1
    loss = sum(losses) / targets
    loss.backward()
    return torch.cat(logits), loss.detach(), [parameter.grad for parameter in model.parameters()]


def sharded(family: str, ids: torch.Tensor, ring: int, ulysses: int, reentrant: bool | None) -> tuple:
    mesh = mesh_of(ring, ulysses)
    model = model_of(family)
    parallelize(model, mesh)
    if reentrant is not None:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    batch = shard_batch({"input_ids": ids[None], "labels": ids[None]}, DOCS, mesh)
    output = model(**batch)
    output.loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    for gradient in gradients:
        dist.all_reduce(gradient)
        gradient /= mesh.sequence_size
    return batch["cu_seq_lens_q"].unshard(output.logits[0].detach()), output.loss.detach(), gradients


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("ring", "ulysses", "reentrant"), [(1, 1, None), (2, 1, True), (1, 2, False), (2, 2, None)])
def test_logits_loss_and_gradients_are_those_of_documents_alone(
    pool: Pools, family: str, ring: int, ulysses: int, reentrant: bool | None
) -> None:
    ids = torch.randint(0, 97, (DOCS.total,), generator=torch.Generator().manual_seed(1))
    logits, loss, gradients = alone(family, ids)
    for got_logits, got_loss, got_gradients in pool(ring * ulysses).run(sharded, family, ids, ring, ulysses, reentrant):
        torch.testing.assert_close(got_logits, logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got_loss, loss, rtol=1e-6, atol=1e-6)
        for got, expected in zip(got_gradients, gradients, strict=True):
            assert (got - expected).norm() <= 1e-5 * expected.norm()


def replicas_of_uneven_batches(data: int, ring: int) -> tuple[float, torch.Tensor]:
    """Each replica has its own documents; loss and averaged gradient of the first weight."""
    mesh = init_mesh(data=data, ring=ring, ulysses=1, device_type="cpu")
    model = model_of("LlamaForCausalLM", num_hidden_layers=1)
    parallelize(model, mesh)
    loss: torch.Tensor | float = 0.0
    for replica in range(2):
        if data == 1 or mesh.data_rank == replica:
            docs = Documents([[9, 3], [20]][replica])
            ids = torch.randint(0, 97, (docs.total,), generator=torch.Generator().manual_seed(replica))
            batch = shard_batch({"input_ids": ids, "labels": ids}, docs, mesh)
            share = 1.0 if data > 1 else (docs.total - len(docs)) / 29  # 10 and 19 targets
            loss = loss + model(**batch).loss * share
    loss.backward()  # type: ignore[union-attr]
    gradient = next(model.parameters()).grad
    dist.all_reduce(gradient)
    return float(loss), gradient / dist.get_world_size()


def test_replicas_count_their_targets_together(pool: Pools) -> None:
    together = pool(4).run(replicas_of_uneven_batches, 2, 2)
    alone, gradient = pool(2).run(replicas_of_uneven_batches, 1, 2)[0]
    for loss, other in together:
        assert loss == pytest.approx(alone, rel=1e-6)
        torch.testing.assert_close(other, gradient, rtol=1e-5, atol=1e-6)


def shift_labels_loss(beside_labels: bool) -> tuple[float, float]:
    """Ours, and transformers' own on one process, of targets that are not those of the labels."""
    ids = torch.randint(0, 97, (1, 20), generator=torch.Generator().manual_seed(1))
    targets = ids.roll(-3, 1).masked_fill(torch.arange(20) % 5 == 0, -100)
    batch = {"input_ids": ids, "shift_labels": targets} | ({"labels": ids} if beside_labels else {})
    model = model_of("LlamaForCausalLM")
    stock = model(input_ids=ids, labels=ids, shift_labels=targets, use_cache=False).loss
    mesh = mesh_of(2, 1)
    parallelize(model, mesh)
    return float(model(**shard_batch(batch, None, mesh)).loss), float(stock)


@pytest.mark.parametrize("beside_labels", [False, True])
def test_the_loss_of_shift_labels(pool: Pools, beside_labels: bool) -> None:
    for loss, stock in pool(2).run(shift_labels_loss, beside_labels):
        assert loss == pytest.approx(stock, rel=1e-6)


def own_losses(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of a loss of one's own, as the README says how, and of the same loss of documents alone."""
    ids = torch.randint(0, 97, (DOCS.total,), generator=torch.Generator().manual_seed(1))
    _, _, truth = alone("LlamaForCausalLM", ids)
    mesh, model = mesh_of(2, 2), model_of("LlamaForCausalLM")
    parallelize(model, mesh)
    batch = shard_batch({"input_ids": ids, "labels": ids}, DOCS, mesh)
    layout, targets, count = batch["cu_seq_lens_q"], batch.pop("shift_labels")[0], batch.pop("num_items_in_batch")
    del batch["labels"]
    logits = model(**batch).logits[0].float()
    if kind == "of tokens":
        loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / count
        (loss * dist.get_world_size()).backward()
    else:
        whole, all_targets = layout.unshard(logits, grad="same"), layout.unshard(targets)
        (torch.nn.functional.cross_entropy(whole, all_targets) * mesh.sequence_size).backward()
    gradient = model.lm_head.weight.grad
    dist.all_reduce(gradient)
    return gradient / dist.get_world_size(), truth[-1]


@pytest.mark.parametrize("kind", ["of tokens", "of the whole stream"])
def test_losses_of_ones_own(pool: Pools, kind: str) -> None:
    for gradient, truth in pool(4).run(own_losses, kind):
        torch.testing.assert_close(gradient, truth, rtol=1e-5, atol=1e-6)


def autocast_loss(autocast: bool, ring: int) -> torch.Tensor:
    mesh = mesh_of(ring, 1)
    model = model_of("LlamaForCausalLM", num_hidden_layers=1)
    parallelize(model, mesh)
    ids = torch.randint(0, 97, (DOCS.total,), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**shard_batch({"input_ids": ids, "labels": ids}, DOCS, mesh)).loss
    loss.backward()
    return loss.detach()


def test_autocast_rounds_as_one_rank_does(pool: Pools) -> None:
    """Two ranks round what one rounds; of the loss only sums in another order are left."""
    plain, rounded = (pool(2).run(autocast_loss, autocast, 2)[0] for autocast in (False, True))
    assert plain != rounded
    torch.testing.assert_close(rounded, pool(1).run(autocast_loss, True, 1)[0], rtol=1e-4, atol=0)


def copying_nodes(family: str) -> set[str]:
    """Gradients that are copied into zeros for a whole batch, in the graph of a loss."""
    mesh, docs = mesh_of(1, 1), Documents([40, 24])
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(read_config(family)))
    parallelize(model, mesh)
    ids = torch.arange(docs.total)[None] % 32
    loss = model(**shard_batch({"input_ids": ids, "labels": ids}, docs, mesh)).loss
    seen, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [one for one, _ in node.next_functions]
    return {node.name() for node in seen} & {"SelectBackward0", "IndexBackward0"}


@pytest.mark.parametrize("family", ["llama", "lfm2"])
def test_no_gradient_is_copied_into_zeros(pool: Pools, family: str) -> None:
    """As that of x[0] is, of queries as of all rows of a recurrence."""
    assert pool(1).run(copying_nodes, family)[0] == set()
