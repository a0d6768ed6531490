"""`parallelize` and its handle: what is installed, verified, left alone and undone."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ringattn import Documents
from ringattn.hf import parallelize, shard_batch
from ringattn.hf.conformance import FORMS, alone, differences, together
from ringattn.hf.tiny import read_config, tiny_config, tiny_model
from tests.parallel.ranks import mesh_of
from tests.pool import Pools

transformers = pytest.importorskip("transformers")


def fresh(family: str = "llama", **changes: Any) -> Any:
    return tiny_model(tiny_config(read_config(family), **changes))


def undone() -> None:
    model = fresh("gpt_oss")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    loss, implementation = model.loss_function, model.config._attn_implementation
    first = alone(model, FORMS[3])
    handle = parallelize(model, mesh_of(1, 1))
    assert model.config._attn_implementation == "ringattn"
    together(model, mesh_of(1, 1), FORMS[3])
    handle.undo()
    handle.undo()
    assert (model.loss_function, model.config._attn_implementation) == (loss, implementation)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(alone(model, FORMS[3]).logits, first.logits)
    assert model.generate(torch.arange(1, 5)[None], max_new_tokens=2, use_cache=True).shape == (1, 6)
    parallelize(model, mesh_of(1, 1)).undo()  # and again


def test_undo_leaves_the_model_as_it_was(pool: Pools) -> None:
    pool(1).run(undone)


def verified() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    model = fresh("gemma3_text")
    handle = parallelize(model, mesh_of(1, 1))
    assert "ringattn" in AttentionInterface().valid_keys()
    assert "ringattn" in AttentionMaskInterface().valid_keys()
    assert not handle.verified
    together(model, mesh_of(1, 1), FORMS[0])
    assert handle.verified
    assert handle.layers_seen == handle.layers == 6
    assert handle.calls == {f"layer {index}": 1 for index in range(6)}
    assert [index for index, asked in handle.asked.items() if asked == {"window"}] == [0, 1, 2, 3, 4]


def test_the_first_forward_is_verified(pool: Pools) -> None:
    pool(1).run(verified)


def skipping(kind: str) -> None:
    model = fresh()
    parallelize(model, mesh_of(1, 1))
    attention = model.model.layers[1].self_attn
    inside = attention.forward
    if kind == "ignored":
        attention.forward = lambda hidden_states, **_: (hidden_states, None)
    else:
        attention.forward = lambda **kwargs: (inside(**kwargs), inside(**kwargs))[0]
    together(model, mesh_of(1, 1), FORMS[0])


@pytest.mark.parametrize(("kind", "words"), [("ignored", "3 of its 4 attention layers"), ("twice", "more than once")])
def test_layers_that_do_not_call_once(pool: Pools, kind: str, words: str) -> None:
    with pytest.raises(NotImplementedError, match=words):
        pool(1).run(skipping, kind)


class OwnLossForCausalLM(transformers.LlamaForCausalLM):
    """Computes its loss from labels by itself, as some models do."""

    def forward(self, *args: Any, labels: Any = None, return_dict: bool = True, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.loss = output.logits.mean()
        return output if return_dict else (output.loss, output.logits)


class PenaltyForCausalLM(transformers.LlamaForCausalLM):
    """Adds something of a rank's own tokens to the loss."""

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.loss = output.loss + 0.1 * output.logits.float().square().mean()
        return output if return_dict else output.to_tuple()


class PenaltyInPlaceForCausalLM(transformers.LlamaForCausalLM):
    """Adds it to the very tensor that it was given, as mixtures of experts do with the loss of their routers."""

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.loss += 0.1 * output.logits.float().square().mean()
        return output if return_dict else output.to_tuple()


def own_loss(kind: type, return_dict: bool) -> None:
    model = kind(tiny_config(read_config("llama")))
    parallelize(model, mesh_of(1, 1))
    ids = torch.arange(8)[None]
    model(**shard_batch({"input_ids": ids, "labels": ids}, None, mesh_of(1, 1)), return_dict=return_dict)


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("kind", [OwnLossForCausalLM, PenaltyForCausalLM, PenaltyInPlaceForCausalLM])
def test_a_loss_that_does_not_come_here_is_refused(pool: Pools, kind: type, return_dict: bool) -> None:
    with pytest.raises(NotImplementedError, match=f"{kind.__name__} computes its loss itself, or adds something"):
        pool(1).run(own_loss, kind, return_dict)


def multimodal() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a text decoder inside of a multimodal model, on embeddings of text."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    text = tiny_config(read_config("gemma3_text"), vocab_size=120)
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_id=100)
    model = Gemma3ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.12)
    model.set_attn_implementation("eager")
    embeddings = torch.randn(1, 20, 64)
    docs = Documents([9, 11])
    parts = [
        model(inputs_embeds=part, use_cache=False).logits[0].detach() for part in embeddings.split(docs.lengths, dim=1)
    ]
    mesh = mesh_of(2, 1)
    parallelize(model, mesh)
    assert model.config.vision_config._attn_implementation == "eager"
    assert model.config.text_config._attn_implementation == "ringattn"
    assert not any(hasattr(module, "_ringattn") for module in model.model.vision_tower.modules())
    model.model.vision_tower(torch.randn(1, 3, 16, 16))  # still works by itself
    batch = {"inputs_embeds": embeddings, "token_type_ids": torch.zeros(1, 20, dtype=torch.int64)}
    local = shard_batch(batch, docs, mesh, policy="zigzag")
    return torch.cat(parts), local["cu_seq_lens_q"].unshard(model(**local).logits[0].detach())


def test_text_model_inside_a_multimodal_one(pool: Pools) -> None:
    for expected, found in pool(2).run(multimodal):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def several_axes() -> tuple[torch.Tensor, torch.Tensor]:
    """M-RoPE: positions of three axes, which differ (an image in the middle), in Qwen2-VL's text model."""
    from transformers import Qwen2VLTextConfig, Qwen2VLTextModel

    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    config = tiny_config(Qwen2VLTextConfig(), num_key_value_heads=2, rope_parameters=rope)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = Qwen2VLTextModel(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.12)
    lengths = (9, 14)
    ids = torch.randint(3, 97, (1, 23))
    positions = torch.randint(0, 9, (3, 1, 23)).sort(-1).values
    parts = [
        model(input_ids=part, position_ids=place, use_cache=False).last_hidden_state[0].detach()
        for part, place in zip(ids.split(lengths, 1), positions.split(lengths, 2), strict=True)
    ]
    mesh = mesh_of(2, 1)
    parallelize(model, mesh)
    batch = {"input_ids": ids, "position_ids": positions, "cu_seq_lens_q": [0, 9, 23]}
    local = shard_batch(batch, None, mesh, policy="zigzag")
    return torch.cat(parts), local["cu_seq_lens_q"].unshard(model(**local).last_hidden_state[0].detach())


def test_positions_of_several_axes(pool: Pools) -> None:
    for expected, found in pool(2).run(several_axes):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def float32_norms(warned: bool) -> tuple[torch.Tensor, torch.dtype]:
    """bfloat16 products with float32 norms of queries and keys, as PEFT leaves them: what dtype attention gets."""
    mesh = mesh_of(2, 1)
    model = fresh("qwen3", num_key_value_heads=2).bfloat16()
    for name, module in model.named_modules():
        if name.endswith(("q_norm", "k_norm")):
            module.float()
    inner = model.model.layers[0].self_attn.o_proj
    seen: list[torch.dtype] = []
    inner.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    parallelize(model, mesh)
    ids = torch.arange(3, 23)[None]
    with pytest.warns(UserWarning, match="cast to torch.bfloat16"):
        loss = model(**shard_batch({"input_ids": ids, "labels": ids}, Documents([8, 12]), mesh)).loss
    loss.backward()
    return loss.detach(), seen[0]


def test_float32_norms_do_not_widen_attention(pool: Pools) -> None:
    loss, dtype = pool(2).run(float32_norms, True)[0]
    assert dtype == torch.bfloat16
    assert torch.isfinite(loss)


def compiled_layers(family: str) -> list[Any]:
    """Errors of a model whose layers are compiled one by one, over batches of several lengths."""
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    mesh, model = mesh_of(2, 1), fresh(family, **layers)
    torch._dynamo.reset()
    truths = [alone(model, form) for form in FORMS[3:]]
    handle = parallelize(model, mesh)
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    errors = [differences(together(model, mesh, form), truth) for form, truth in zip(FORMS[3:], truths, strict=True)]
    assert handle.verified
    return errors


@pytest.mark.nightly
@pytest.mark.parametrize("family", ["granite_swa", "gemma2"])
def test_layers_compiled_one_by_one(pool: Pools, family: str) -> None:
    for errors in pool(2).run(compiled_layers, family, timeout=300.0):
        assert all(e.within(1e-5) for e in errors), errors


def shared_keys(ring: int, ulysses: int) -> Any:
    """Gemma 4 with layers that take the keys of an earlier one, as its small models have."""
    types, wide = ["sliding_attention", "full_attention"] * 2, {1: {"head_dim": 32}, 3: {"head_dim": 32}}
    options: dict[str, Any] = {"num_kv_shared_layers": 2, "num_hidden_layers": 4, "layer_types": types}
    model = fresh("gemma4_text", per_layer_config=wide, **options)
    truth = alone(model, FORMS[4])
    parallelize(model, mesh_of(ring, ulysses))
    return differences(together(model, mesh_of(ring, ulysses), FORMS[4], "zigzag"), truth)


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 1), (2, 1), (1, 2)])
def test_layers_that_share_keys(pool: Pools, ring: int, ulysses: int) -> None:
    for errors in pool(ring * ulysses).run(shared_keys, ring, ulysses):
        assert errors.within(1e-5), errors


def copied() -> None:
    """A deep copy (an average of weights, say) attends over the same ranks, with a handle of its own."""
    model = fresh()
    parallelize(model, mesh_of(1, 1))
    hooks = [len(module._forward_hooks) for module in model.modules()]
    other = copy.deepcopy(model)
    local = shard_batch({"input_ids": torch.arange(8)[None]}, None, mesh_of(1, 1))
    assert torch.equal(other(**local).logits, model(**local).logits)
    assert other._ringattn.model is other
    other._ringattn.undo()
    assert (other.config._attn_implementation, model.config._attn_implementation) == ("eager", "ringattn")
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in other.modules())


def test_a_copied_model_has_a_handle_of_its_own(pool: Pools) -> None:
    pool(1).run(copied)
