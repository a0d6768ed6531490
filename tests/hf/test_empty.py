"""Ranks without tokens: the model runs there too, and all ranks together compute what documents alone do."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

from ringattn import Documents, Layout
from ringattn.hf import parallelize, shard_batch
from ringattn.hf.conformance import Form, alone, differences, together
from tests.hf.families import model_of
from tests.parallel.ranks import mesh_of
from tests.pool import Pools

# Documents, ring, policy. Of each some rank of the ring holds nothing.
FEW: dict[str, tuple[tuple[int, ...], int, str]] = {
    "two tokens on a ring of 4": ((2,), 4, "auto"),
    "two short documents, zigzag": ((2, 2), 4, "zigzag"),
    "three tokens, contiguous": ((1, 2), 4, "contiguous"),
}


def few(family: str, name: str, reentrant: bool | None) -> Any:
    lengths, ring, policy = FEW[name]
    mesh, model = mesh_of(ring, 1), copy.deepcopy(model_of(family))
    if family != "gpt_oss":  # its experts are float32 at most; so few tokens leave q and k gradients that this drowns
        model = model.double()
    form = Form(name, (lengths,), sum(lengths), "segment_ids")
    assert 0 in [Layout(form.docs, mesh, policy).tokens(rank) for rank in range(ring)]
    truth = alone(model, form)
    parallelize(model, mesh)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
    return differences(together(model, mesh, form, policy), truth)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma4_text", "llama4_text", "opt"])
def test_few_tokens_are_exact_on_many_ranks(pool: Pools, family: str, name: str) -> None:
    for errors in pool(4).run(few, family, name, None):
        assert errors.within(1e-5), errors


@pytest.mark.parametrize("reentrant", [True, False])
def test_few_tokens_with_checkpointing(pool: Pools, reentrant: bool) -> None:
    for errors in pool(4).run(few, "llama", "two tokens on a ring of 4", reentrant):
        assert errors.within(1e-5), errors


def one_token(kind: str) -> dict[str, Any]:
    """What callers see of a batch of one token on two ranks: shapes by rank, and whether a backward pass ends."""
    mesh, model = mesh_of(2, 1), model_of("llama")
    model.zero_grad()  # kept by the worker, whatever ran before
    handle = parallelize(model, mesh)
    try:
        ids = torch.tensor([[5]])
        source: dict[str, Any] = {"input_ids": ids}
        if kind == "embeddings":
            source = {"inputs_embeds": model.get_input_embeddings()(ids)}
        local = shard_batch(source, Documents([1]), mesh)
        layout = local["cu_seq_lens_q"]
        called = model.model if kind == "inner model" else model
        if kind == "positional":
            output = called(local.pop("input_ids"), **local)
        else:
            output = called(**local, output_hidden_states=True, return_dict=kind != "tuple")
        first = output[0]
        whole = layout.unshard(first[0], grad="same")
        (whole.square().sum() * dist.get_world_size()).backward()
        gradient = model.model.layers[0].self_attn.v_proj.weight.grad.clone()
        model.zero_grad()
        dist.all_reduce(gradient)
        states = [] if kind in ("tuple", "positional") else [len(state[0]) for state in output.hidden_states]
    finally:
        handle.undo()
    truth = (model.model if kind == "inner model" else model)(input_ids=ids, use_cache=False)[0][0]
    truth.square().sum().backward()
    expected = model.model.layers[0].self_attn.v_proj.weight.grad.clone()
    model.zero_grad()
    torch.testing.assert_close(whole, truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient / dist.get_world_size(), expected, rtol=1e-5, atol=1e-6)
    return {"tokens": layout.tokens(), "rows": first.shape[1], "states": states}


@pytest.mark.parametrize("kind", ["plain", "embeddings", "tuple", "positional", "inner model"])
def test_outputs_of_one_token_on_two_ranks(pool: Pools, kind: str) -> None:
    found = pool(2).run(one_token, kind)
    assert sorted(one["tokens"] for one in found) == [0, 1]
    for one in found:
        assert one["rows"] == one["tokens"]
        assert set(one["states"]) <= {one["tokens"]}


def without_targets() -> float:
    """One token has no target: the loss is 0, on every rank, and so are all gradients."""
    mesh, model = mesh_of(2, 1), model_of("llama")
    model.zero_grad()  # kept by the worker, whatever ran before
    handle = parallelize(model, mesh)
    try:
        ids = torch.tensor([[5]])
        loss = model(**shard_batch({"input_ids": ids, "labels": ids}, None, mesh)).loss
        loss.backward()
        assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
        assert handle.verified
    finally:
        model.zero_grad()
        handle.undo()
    return float(loss)


def test_no_target_at_all(pool: Pools) -> None:
    assert pool(2).run(without_targets) == [0.0, 0.0]


def compiled() -> Any:
    mesh, model = mesh_of(4, 1), model_of("llama")
    form = Form("few", ((2,),), 2, "segment_ids")
    torch._dynamo.reset()
    truth = alone(model, form)
    handle = parallelize(model, mesh)
    plain = [layer.forward for layer in model.model.layers]
    try:
        for layer in model.model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
        return differences(together(model, mesh, form), truth)
    finally:
        for layer, forward in zip(model.model.layers, plain, strict=True):
            layer._compiled_call_impl = None
            layer.forward = forward
        handle.undo()


@pytest.mark.nightly
def test_compiled_layers_take_ranks_without_tokens(pool: Pools) -> None:
    for errors in pool(4).run(compiled, timeout=300.0):
        assert errors.within(1e-5), errors
