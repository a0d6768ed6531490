"""What is changed after `parallelize`, and batches that are not the model's: noticed in every forward pass."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ringattn import Documents, init_mesh
from ringattn.hf import parallelize, shard_batch
from ringattn.hf.conformance import FORMS, alone, differences, together
from ringattn.hf.tiny import read_config, tiny_config, tiny_model
from tests.parallel.ranks import mesh_of
from tests.pool import Pools

transformers = pytest.importorskip("transformers")
IDS = torch.arange(3, 23)[None]
DOCS = Documents([12, 8])


def fresh(family: str = "llama", **changes: Any) -> Any:
    return tiny_model(tiny_config(read_config(family), **changes))


def batch() -> dict[str, Any]:
    return shard_batch({"input_ids": IDS, "labels": IDS}, DOCS, mesh_of(2, 1))


def other_attention(model: Any) -> None:
    model.set_attn_implementation("sdpa")


def other_attention_of_layers(model: Any) -> None:
    """Another configuration object for some layers: the model's own still says ringattn."""
    config = type(model.config)(**model.config.to_dict())
    config._attn_implementation = "sdpa"
    for layer in model.model.layers[2:]:
        layer.self_attn.config = config


def layer_skipped(model: Any) -> None:
    model.model.layers[1].forward = lambda hidden_states, *args, **kwargs: hidden_states


def other_layer(model: Any) -> None:
    attention = model.model.layers[1].self_attn
    model.model.layers[1].self_attn = type(attention)(attention.config, 1)


def shared_configuration(model: Any) -> None:
    """A second model of the same configuration object is parallelized and undone: so is the first one's name."""
    other = type(model)(model.config)
    model.config._attn_implementation = "eager"
    parallelize(other, mesh_of(2, 1)).undo()


CHANGES: dict[str, tuple[Callable[[Any], None], type[Exception], str]] = {
    "attention": (other_attention, NotImplementedError, "attn_implementation='sdpa' by now"),
    "attention of layers": (other_attention_of_layers, NotImplementedError, "attn_implementation='sdpa' by now"),
    "a layer skipped": (layer_skipped, NotImplementedError, "3 of its 4 .* changed after its first"),
    "another layer": (other_layer, ValueError, "this model was not given to it"),
    "shared configuration": (shared_configuration, NotImplementedError, "attn_implementation='eager' by now"),
}


def changed(name: str) -> None:
    model = fresh()
    parallelize(model, mesh_of(2, 1))
    model(**batch()).loss.backward()
    CHANGES[name][0](model)
    model(**batch())


@pytest.mark.parametrize("name", CHANGES)
def test_changes_after_the_first_forward_pass(pool: Pools, name: str) -> None:
    _, error, words = CHANGES[name]
    with pytest.raises(error, match=words):
        pool(2).run(changed, name)


def set_and_set_again() -> Any:
    """Back to ringattn by parallelize, after the attention was changed."""
    model = fresh()
    truth = alone(model, FORMS[3])
    handle = parallelize(model, mesh_of(2, 1))
    model.set_attn_implementation("sdpa")
    handle.undo()
    parallelize(model, mesh_of(2, 1))
    return differences(together(model, mesh_of(2, 1), FORMS[3]), truth)


def test_a_changed_model_can_be_parallelized_again(pool: Pools) -> None:
    for errors in pool(2).run(set_and_set_again):
        assert errors.within(1e-5)


def second_model_of_a_configuration() -> None:
    model = fresh()
    plain = type(model)(model.config).eval()
    parallelize(model, mesh_of(1, 1))
    plain(input_ids=IDS, use_cache=False)


def test_a_plain_model_that_shares_the_configuration(pool: Pools) -> None:
    with pytest.raises(ValueError, match="this model was not given to it: it shares its configuration"):
        pool(1).run(second_model_of_a_configuration)


def on_another_mesh(kind: str) -> None:
    model = fresh()
    ring, data = mesh_of(2, 1), init_mesh(data=2, ring=1, ulysses=1, device_type="cpu")
    parallelize(model, ring if kind == "model on a ring" else data)
    source = {"input_ids": IDS, "labels": IDS}
    model(**shard_batch(source, DOCS, data if kind == "model on a ring" else ring))


@pytest.mark.parametrize("kind", ["model on a ring", "model of two replicas"])
def test_a_batch_of_another_mesh(pool: Pools, kind: str) -> None:
    with pytest.raises(ValueError, match=r"the batch was sharded on SequenceMesh.* the model is parallelized on"):
        pool(2).run(on_another_mesh, kind)


def mean(logits: Any, labels: Any, vocab_size: int, shift_labels: Any = None, **_: Any) -> Any:
    return nn.functional.cross_entropy(logits.float().view(-1, vocab_size), shift_labels.view(-1), ignore_index=-100)


def weighted(logits: Any, labels: Any, shift_labels: Any, num_items_in_batch: Any, **_: Any) -> Any:
    """A sum over targets with a weight for each word: exact on any number of ranks."""
    weights = torch.linspace(0.5, 2.0, logits.shape[-1])
    total = nn.functional.cross_entropy(logits[0].float(), shift_labels[0], weights, ignore_index=-100, reduction="sum")
    return total / num_items_in_batch


def pooled(logits: Any, labels: Any, shift_labels: Any, num_items_in_batch: Any, **_: Any) -> Any:
    """Divides as it should, and is no sum over targets."""
    total = nn.functional.cross_entropy(logits[0].float(), shift_labels[0], ignore_index=-100, reduction="sum")
    return total**2 / num_items_in_batch


def without_keywords(logits: Any, labels: Any) -> Any:
    return logits.mean()


class Criterion:
    """Has its loss as a bound method."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def loss(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def with_loss(function: Callable[..., Any], when: str, bound: bool) -> torch.Tensor:
    model = fresh()
    function = Criterion(function).loss if bound else function
    if when == "before":
        model.loss_function = function
    handle = parallelize(model, mesh_of(2, 1))
    if when == "after the first":
        model(**batch())
    if when != "before":
        model.loss_function = function
    loss = model(**batch()).loss
    handle.undo()
    assert model.loss_function == function
    return loss.detach()


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("when", ["before", "after", "after the first"])
def test_a_loss_function_of_the_users(pool: Pools, when: str, bound: bool) -> None:
    """One that ranks can add up is exact, whenever it is set."""
    model = fresh()
    parts = [model(input_ids=part, use_cache=False).logits for part in IDS.split(DOCS.lengths, 1)]
    targets = [torch.cat([part[:, 1:], part.new_full((1, 1), -100)], 1) for part in IDS.split(DOCS.lengths, 1)]
    truth = weighted(torch.cat(parts, 1), None, torch.cat(targets, 1), torch.tensor(18))
    for loss in pool(2).run(with_loss, weighted, when, bound):
        torch.testing.assert_close(loss, truth.detach(), rtol=1e-5, atol=1e-6)


def of_labels(logits: Any, labels: Any, shift_labels: Any, num_items_in_batch: Any, vocab_size: int, **_: Any) -> Any:
    """Sums over labels where they stand, as for masked language models: those are not the targets that were counted."""
    total = nn.functional.cross_entropy(logits.float().view(-1, vocab_size), labels.view(-1), reduction="sum")
    return total / num_items_in_batch


LOSSES: dict[str, tuple[Callable[..., Any], str]] = {
    "mean": (mean, "mean, and ranks add up .* with twice num_items_in_batch it returns"),
    "pooled": (pooled, "pooled, and ranks add up .* of two parts, added up, it returns"),
    "labels": (of_labels, "of_labels, and ranks add up .* without a target it returns"),
    "keywords": (without_keywords, "without_keywords, and ranks add up .* raises TypeError"),
}


@pytest.mark.parametrize("when", ["before", "after", "after the first"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_function_that_ranks_cannot_add_up(pool: Pools, name: str, when: str) -> None:
    function, words = LOSSES[name]
    with pytest.raises(NotImplementedError, match=words):
        pool(2).run(with_loss, function, when, False)


def far_positions(family: str) -> None:
    """The positions of one rank alone are beyond what the model's rotary embedding keeps."""
    model = fresh(family, **FAR)
    mesh = mesh_of(2, 1)
    parallelize(model, mesh)
    positions = torch.cat([torch.arange(6), torch.arange(5, 11)])[None]
    batch = {"input_ids": IDS[:, :12], "position_ids": positions}
    model(**shard_batch(batch, Documents([6, 6]), mesh, policy="contiguous"))


FAR = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "max_position_embeddings": 8}


def test_what_one_rank_sees_is_refused_by_all(pool: Pools) -> None:
    with pytest.raises(NotImplementedError, match="exact up to 8 tokens, got 11") as refusal:
        pool(2).run(far_positions, "llama")
    assert "(rank [" in str(refusal.value.__cause__)


def of_the_rank(kind: str) -> None:
    """Every rank has a batch of its own, as a sampler for data parallelism deals them."""
    model, mesh = fresh(), mesh_of(2, 1)
    parallelize(model, mesh)
    rank = mesh.sequence_rank
    ids = IDS.flip(1) if kind == "ids" and rank else IDS
    docs = Documents([7 + rank, 13 - rank]) if kind == "documents" else DOCS
    model(**shard_batch({"input_ids": ids, "labels": ids}, docs, mesh))


@pytest.mark.parametrize("kind", ["ids", "documents"])
def test_ranks_with_batches_of_their_own(pool: Pools, kind: str) -> None:
    with pytest.raises(ValueError, match=f"different batches: their {'input_ids' if kind == 'ids' else kind} differ"):
        pool(2).run(of_the_rank, kind)
