"""The load-balancing loss of routers: over ranks it is that of one process, and what is not known is refused."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import transformers

from ringattn import Documents
from ringattn.hf import parallelize, shard_batch
from ringattn.hf.conformance import (
    FORMS,
    Form,
    Outcome,
    averaged_gradients,
    differences,
    gradients_of,
    together,
    vocabulary_of,
)
from ringattn.hf.loss import IGNORE_INDEX, shifted_labels
from ringattn.hf.router_loss import experts_taken
from ringattn.hf.tiny import read_config, tiny_config
from ringattn.memory.settings import MemorySettings
from tests.hf.families import FAMILIES, model_of
from tests.parallel.ranks import mesh_of
from tests.pool import Pools

COEFFICIENT = 0.3  # so large that it shows
FEW = Form("few", ((2,),), 2, "segment_ids")  # on four ranks two hold nothing


def asking(family: str, **changes: Any) -> Any:
    """A model that adds the loss of its routers."""
    model = copy.deepcopy(model_of(family))
    config = model.config.get_text_config()
    config.output_router_logits = True
    for holder in (model, config):
        if hasattr(holder, "router_aux_loss_coef"):
            holder.router_aux_loss_coef = COEFFICIENT
    return model


def written_out(layers: list[Tensor], taken: int) -> Tensor:
    """The formula in float64, as it stands in the paper but for the sum over layers."""
    probabilities = torch.cat(layers).double().softmax(-1)
    chosen = nn.functional.one_hot(probabilities.topk(taken, -1).indices, probabilities.shape[-1]).sum(-2)
    return probabilities.shape[-1] * (chosen.double().mean(0) * probabilities.mean(0)).sum()


def truth(model: Any, form: Form, taken: int) -> tuple[Outcome, float]:
    """Every document by itself through the stock model, and the loss of the routers of all of them."""
    docs, batch = form.docs, form.batch(vocabulary_of(model))
    ids, targets = batch["input_ids"].flatten(), shifted_labels(batch["labels"].flatten(), docs)
    logits, layers, total = [], [], torch.zeros(())
    model.zero_grad()
    for start, length in zip(docs.starts, docs.lengths, strict=True):
        part = slice(start, start + length)
        out = model(input_ids=ids[None, part], use_cache=False, output_router_logits=True)
        total = total + nn.functional.cross_entropy(out.logits[0].float(), targets[part], reduction="sum")
        logits.append(out.logits[0].detach())
        layers.append(out.router_logits)
    aux = written_out([torch.cat(one) for one in zip(*layers, strict=True)], taken)
    loss = total / (targets != IGNORE_INDEX).sum() + COEFFICIENT * aux
    loss.backward()
    return Outcome(torch.cat(logits), loss.detach(), gradients_of(model)), float(aux)


def both(family: str, name: str, ring: int, ulysses: int, checkpointed: bool = False) -> Any:
    form = next(form for form in (*FORMS, FEW) if form.name == name)
    model, mesh = asking(family), mesh_of(ring, ulysses)
    if family in ("mixtral", "qwen3_moe"):
        model.set_experts_implementation("eager")  # the others compute in float32 at most
        model = model.double()
    taken = model.config.get_text_config().num_experts_per_tok
    expected, aux = truth(model, form, taken)
    handle = parallelize(model, mesh)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    found = together(model, mesh, form)
    with torch.no_grad():
        local = shard_batch(form.batch(vocabulary_of(model)), None, mesh)
        told = float(model(**local).aux_loss)
    assert handle.routers.taken == taken
    assert told == pytest.approx(aux, rel=1e-5)
    return differences(found, expected)


WITH_ROUTERS = [
    "mixtral",
    "qwen3_moe",
    "qwen2_moe",
    "phimoe",
    "gpt_oss",
    "qwen3_next",
    "qwen3_5_moe_text",
    "granitemoehybrid",
    "jamba",
]


@pytest.mark.parametrize("family", WITH_ROUTERS)
def test_families(pool: Pools, family: str) -> None:
    for errors in pool(2).run(both, family, "two packed rows", 2, 1):
        assert errors.within(1e-5), errors


@pytest.mark.parametrize("name", [form.name for form in FORMS])
def test_forms(pool: Pools, name: str) -> None:
    for errors in pool(2).run(both, "mixtral", name, 1, 2):
        assert errors.within(1e-6), errors


@pytest.mark.parametrize("name", ["few", "right padded"])
def test_ranks_without_tokens(pool: Pools, name: str) -> None:
    for errors in pool(4).run(both, "mixtral", name, 4, 1):
        assert errors.within(1e-6), errors


def test_checkpointed_layers(pool: Pools) -> None:
    for errors in pool(2).run(both, "qwen3_moe", "packed", 2, 1, True):
        assert errors.within(1e-6), errors


SHORT, LONG = Form("short", ((5, 3),), 8, "segment_ids"), Form("long", ((9, 7),), 16, "segment_ids")


def of_streams(kind: str) -> Any:
    """Two streams of different lengths: of two replicas, or of one accumulated step."""
    model = asking("mixtral")
    parts, losses = [], []
    for form in (SHORT, LONG):
        outcome, aux = truth(model, form, 2)
        targets = shifted_labels(form.batch(vocabulary_of(model))["labels"].flatten(), form.docs)
        parts.append((outcome, int((targets != IGNORE_INDEX).sum()), aux))
    whole = sum(count for _, count, _ in parts)
    expected = {
        name: sum(outcome.gradients[name] * count for outcome, count, _ in parts) / whole
        for name in parts[0][0].gradients
    }
    mesh = mesh_of(1, 2)
    model.zero_grad()
    parallelize(model, mesh)
    mine = (SHORT, LONG) if kind == "accumulated" else ((SHORT, LONG)[mesh.data_rank],)
    for form in mine:
        batch = form.batch(vocabulary_of(model))
        if kind == "accumulated":
            batch["num_items_in_batch"] = torch.tensor(whole)
        output = model(**shard_batch(batch, None, mesh))
        output.loss.backward()
        losses.append(output.loss.detach())
    found = averaged_gradients(model)
    loss = sum(outcome.loss * count for outcome, count, _ in parts) / whole
    empty = torch.zeros(1)
    return differences(Outcome(empty, sum(losses), found), Outcome(empty, loss, expected))


@pytest.mark.parametrize(("kind", "ranks"), [("replicas", 4), ("accumulated", 2)])
def test_streams_count_by_their_targets(pool: Pools, kind: str, ranks: int) -> None:
    for errors in pool(ranks).run(of_streams, kind):
        assert errors.within(1e-5), errors


def with_memory(**settings: Any) -> Any:
    model, mesh, form = asking("qwen3_moe"), mesh_of(2, 1), FORMS[3]
    expected, _ = truth(model, form, model.config.num_experts_per_tok)
    model.train()
    parallelize(model, mesh, MemorySettings(**settings))
    model.zero_grad()
    output = model(**shard_batch(form.batch(vocabulary_of(model)), None, mesh))
    output.loss.backward()
    found = Outcome(expected.logits, output.loss.detach(), averaged_gradients(model))
    return differences(found, expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"keep": "layer"},
        {"keep": "attention", "every": 2, "loss_tile": 4},
        {"keep": "selective", "loss_tile": 4},
    ],
    ids=str,
)
def test_beside_memory_settings(pool: Pools, settings: dict[str, Any]) -> None:
    for errors in pool(2).run(with_memory, **settings):
        assert errors.within(1e-5), errors


def without_labels() -> None:
    """Whoever makes a loss of their own adds `aux_loss` to it; and another coefficient counts from then on."""
    model, mesh, form = asking("mixtral"), mesh_of(2, 1), FORMS[3]
    expected, _ = truth(model, form, 2)
    parallelize(model, mesh)
    batch = shard_batch(form.batch(vocabulary_of(model)), None, mesh)
    model.zero_grad()
    output = model(**{name: x for name, x in batch.items() if "labels" not in name and name != "num_items_in_batch"})
    assert output.loss is None
    output.aux_loss.backward()
    gradients = averaged_gradients(model)
    model.router_aux_loss_coef = 0.0
    model.zero_grad()
    plain = model(**batch)
    plain.loss.backward()
    rest = averaged_gradients(model)
    summed = {name: COEFFICIENT * gradients.get(name, 0) + x for name, x in rest.items()}
    found = Outcome(expected.logits, plain.loss.detach() + COEFFICIENT * output.aux_loss.detach(), summed)
    assert differences(found, expected).within(1e-5)
    quiet = model(**batch, output_router_logits=False)
    assert quiet.aux_loss is None
    assert torch.equal(quiet.loss, plain.loss)


def test_a_loss_of_ones_own(pool: Pools) -> None:
    pool(2).run(without_labels)


class OtherTermForCausalLM(transformers.MixtralForCausalLM):
    """Another loss of its routers."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.loss = output.loss + self.router_aux_loss_coef * output.aux_loss
        output.aux_loss = output.aux_loss * 2
        return output


class OtherSumForCausalLM(transformers.MixtralForCausalLM):
    """Adds it with another coefficient than it says."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.loss = output.loss + output.aux_loss
        return output


def refused(kind: str) -> None:
    mesh = mesh_of(2, 1)
    config = tiny_config(read_config("mixtral"), **FAMILIES["mixtral"], output_router_logits=kind != "tiles later")
    model = {"term": OtherTermForCausalLM, "sum": OtherSumForCausalLM}.get(kind, transformers.MixtralForCausalLM)(
        config
    )
    parallelize(model, mesh, MemorySettings(mlp_tile=4) if "tiles" in kind else None)
    if kind == "reentrant":
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": True})
    ids = torch.arange(2, 10)[None]
    if kind == "trees":
        docs = Documents.from_tree([4, 2, 2], [-1, 0, 0])
        model(**shard_batch({"input_ids": ids, "shift_labels": ids}, docs, mesh))
    extra = {"return_dict": False} if kind == "tuple" else {"output_router_logits": True}
    model(**shard_batch({"input_ids": ids, "labels": ids}, None, mesh), **extra)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("term", "OtherTermForCausalLM has another loss of its routers than the one known"),
        ("sum", "the loss of OtherSumForCausalLM is not the sum of what its loss function gave"),
        ("tiles", "in tiles a router's logits are gone"),
        ("tiles later", "in tiles a router's logits are gone"),
        ("trees", "share what they begin with"),
        ("tuple", "return_dict=False"),
        ("reentrant", "no gradient reaches its routers' logits"),
    ],
)
def test_what_is_not_known_is_refused(pool: Pools, kind: str, words: str) -> None:
    with pytest.raises(NotImplementedError, match=words):
        pool(2).run(refused, kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("taken", [1, 2, 5, 8])
def test_the_number_of_experts_is_found(taken: int, dtype: torch.dtype) -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    generator = torch.Generator().manual_seed(taken)
    layers = tuple(torch.randn(37, 8, generator=generator).to(dtype) for _ in range(3))
    assert experts_taken(layers, load_balancing_loss_func(layers, 8, taken)) == taken
    assert experts_taken(layers, load_balancing_loss_func(layers, 8, taken) * 1.07) == 0
