"""A model's head and loss in tiles: what families do to their logits is seen and done, anything else is refused."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

from ringattn.hf.disguised import LossAsLogits, Step
from ringattn.hf.head import TiledHead
from tests.pool import Pools

SMALL = {
    "vocab_size": 41, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "llama": ({}, ()),
    "qwen3": ({"tie_word_embeddings": True}, ()),
    "phi": ({}, ()),  # its head has a bias
    "gemma2": ({"final_logit_softcapping": 5.0}, (Step("div", (5.0,)), Step("tanh"), Step("mul", (5.0,)))),
    "cohere": ({"logit_scale": 0.25}, (Step("mul", (0.25,)),)),
    "granite": ({"logits_scaling": 3.0}, (Step("div", (3.0,)),)),
    "falcon_h1": (
        {"lm_head_multiplier": 0.5, "mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 8},
        (Step("mul", (0.5,)),),
    ),
    "mixtral": ({"num_local_experts": 4, "experts_implementation": "eager"}, ()),
}


def small(family: str, **changes) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SMALL | FAMILIES.get(family, ({},))[0] | changes))
    return AutoModelForCausalLM.from_config(config).double()


def summed(logits, labels, vocab_size, shift_labels=None, **kwargs) -> Tensor:
    """The loss of a model in these tests: a sum over targets, tiled or not."""
    if isinstance(logits, LossAsLogits):
        return logits.loss()
    return F.cross_entropy(logits.flatten(0, -2), shift_labels.flatten(), reduction="sum", ignore_index=-100) / 7


@pytest.mark.parametrize(("family", "tile"), [("llama", 1), ("llama", 100), *((family, 5) for family in FAMILIES)])
def test_families_get_the_loss_and_gradients_that_they_had(family, tile):
    model = small(family)
    model.loss_function = summed
    ids = torch.randint(0, 41, (1, 23))
    targets = torch.where(torch.rand(1, 23) < 0.3, -100, ids.roll(-1))
    wanted = model(input_ids=ids, labels=ids, shift_labels=targets).loss
    gradients = torch.autograd.grad(wanted, list(model.parameters()), allow_unused=True)

    head = TiledHead(model, tile)
    assert head.steps == FAMILIES[family][1]
    head.announce(targets, 1 / 7, count=int((targets != -100).sum()))
    found = model(input_ids=ids, labels=ids, shift_labels=targets).loss
    assert type(found) is Tensor
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    for one, other in zip(
        torch.autograd.grad(found, list(model.parameters()), allow_unused=True), gradients, strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)

    plain = model(input_ids=ids).logits  # nothing announced: logits as ever
    assert type(plain) is Tensor
    head.undo()
    assert torch.equal(model(input_ids=ids).logits, plain)


def test_looking_at_the_head_leaves_the_model_as_it_was():
    model = small("gemma2")
    before = dict(model.__dict__), dict(model._modules), dict(model.lm_head.__dict__)
    TiledHead(model).undo()
    assert (dict(model.__dict__), dict(model._modules), dict(model.lm_head.__dict__)) == before


def test_engines_may_put_a_node_of_theirs_behind_the_head():
    """As DeepSpeed does around each module at stage 3."""

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.detach()

        @staticmethod
        def backward(ctx, grad):
            return 3 * grad

    model = small("gemma2")
    ids = torch.randint(0, 41, (1, 9))
    wanted = []
    for factor in (1, 3):
        head = TiledHead(model)
        hook = model.lm_head.register_forward_hook(lambda _, args, out, f=factor: Node.apply(out) if f == 3 else None)
        model.loss_function = summed
        head.announce(ids, 1.0)
        loss = model(input_ids=ids, labels=ids).loss
        wanted.append((loss.item(), torch.autograd.grad(loss, model.model.norm.weight)[0]))
        hook.remove()
        head.undo()
    assert wanted[0][0] == wanted[1][0]
    torch.testing.assert_close(3 * wanted[0][1], wanted[1][1])


def test_a_model_without_weights_can_be_looked_at():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **SMALL))
    assert [step.name for step in TiledHead(model).steps] == ["div", "tanh", "mul"]


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x.argmax(-1),
        lambda x: x[:, -1],
        lambda x: x.detach().sum(),
        lambda x: x.sum(),
        lambda x: x.view(-1, 41),
        lambda x: x * torch.ones(41),
        lambda x: x.softmax(-1),
        lambda x: torch.cat([x, x]),
        lambda x: x.tolist(),
        lambda x: x.item(),
        lambda x: x.numpy(),
        lambda x: x.data,
        lambda x: x + 1,  # not what this model does
    ],
)
def test_logits_that_are_not_there_cannot_be_used(use):
    model = small("llama")
    model.loss_function = summed
    head = TiledHead(model)
    ids = torch.randint(0, 41, (1, 9))
    head.announce(ids, 1.0)
    logits = model(input_ids=ids, labels=ids).logits
    assert (logits.shape, logits.size(-1), logits.dim(), logits.dtype) == ((1, 9, 41), 41, 3, torch.float64)
    with pytest.raises(NotImplementedError, match=r"there are no logits|cannot be tiled"):
        use(logits)


def test_a_model_that_changes_its_mind_is_refused():
    model = small("gemma2")
    model.loss_function = summed
    head = TiledHead(model)
    ids = torch.randint(0, 41, (1, 9))
    for cap, told in ((6.0, r"the model does div\(logits, 6.0\) where it did div\(logits, 5.0\)"), (None, "left out")):
        model.config.final_logit_softcapping = cap
        head.announce(ids, 1.0)
        with pytest.raises(NotImplementedError, match=told):
            model(input_ids=ids, labels=ids)


def test_heads_that_are_more_than_a_linear_layer_are_refused_by_name():
    class Special(nn.Linear):
        pass

    model = small("llama")
    model.lm_head = Special(16, 41)
    with pytest.raises(NotImplementedError, match=r"LlamaForCausalLM has a Special as its head: .* needs an nn.Linear"):
        TiledHead(model)
    model = small("llama")
    model.lm_head.register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(NotImplementedError, match="the head of LlamaForCausalLM has hooks"):
        TiledHead(model)
    with pytest.raises(NotImplementedError, match="LlamaModel has no head"):
        TiledHead(small("llama").model)
    with pytest.raises(ValueError, match="tile must be a number of tokens >= 1, got 0"):
        TiledHead(small("llama"), 0)


def test_a_forward_pass_that_cannot_be_tiled_is_refused_by_name():
    class Cut(type(small("llama"))):
        def forward(self, input_ids=None, labels=None, **kwargs):
            logits = self.lm_head(self.model(input_ids)[0])
            return self.loss_function(logits[..., :10], labels, 10)

    model = small("llama")
    model.__class__ = Cut
    with pytest.raises(NotImplementedError, match=r"Cut cannot have a tiled loss: __getitem__\(logits, tuple\)"):
        TiledHead(model)


def test_targets_of_other_tokens_are_refused():
    model = small("llama")
    head = TiledHead(model)
    ids = torch.randint(0, 41, (1, 9))
    head.announce(ids, 1.0)
    with pytest.raises(ValueError, match="was given 1 tokens and 9 targets"):
        model(input_ids=ids, labels=ids, logits_to_keep=1)


def sharded_gradients() -> tuple[float, float]:
    """The largest difference of a tiled head's gradients in a model that FSDP2 shards, to the plain model's."""
    ids = torch.randint(0, 41, (1, 23), generator=torch.Generator().manual_seed(0))
    wanted = small("llama")
    wanted.loss_function = summed
    loss = wanted(input_ids=ids, labels=ids, shift_labels=ids).loss
    loss.backward()
    model = small("llama")
    head = TiledHead(model, 5)
    fully_shard(model.model.layers[0], mesh=(mesh := init_device_mesh("cpu", (2,))))
    fully_shard(model, mesh=mesh)
    head.announce(ids, 1 / 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = model(input_ids=ids).logits.loss()
    found.backward()
    differences = [
        float((one.grad.full_tensor() - other.grad).abs().max())
        for one, other in zip(model.parameters(), wanted.parameters(), strict=True)
    ]
    return float((found - loss).abs()), max(differences)


def test_fsdp_shards_a_model_with_a_tiled_head(pool: Pools) -> None:
    """It looks at what a forward pass returns, and puts hooks on it."""
    for loss, gradients in pool(2).run(sharded_gradients):
        assert loss < 1e-11
        assert gradients < 1e-11
