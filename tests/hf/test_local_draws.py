"""Random draws inside of a model: apart on the ranks, repeatable, and without a trace outside."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

pytest.importorskip("transformers")

from ringattn import Documents, init_mesh
from ringattn.hf import parallelize, shard_batch
from ringattn.hf.tiny import read_config, tiny_config, tiny_model
from tests.hf.configuration_keys import TOKEN_KEYS
from tests.hf.tuners import TARGETS, adapted
from tests.parallel.ranks import mesh_of
from tests.pool import Pools

IDS = torch.arange(3, 35)[None]
EQUAL, UNEQUAL = Documents([32]), Documents([9, 3, 20])


def gpt2(**changes: Any) -> Any:
    """With dropout after embeddings, attention and feed-forward, in training."""
    return tiny_model(tiny_config(read_config("gpt2"), resid_pdrop=0.5, embd_pdrop=0.5, **changes)).train()


def batch_on(mesh: Any, docs: Documents, policy: str) -> dict[str, Any]:
    return shard_batch({"input_ids": IDS, "labels": IDS}, docs, mesh, policy)


class Draws(TorchFunctionMode):
    """Keeps what dropout let through (1 or 0 for each element), and the noise of routers."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[torch.Tensor] = []
        self.noise: list[torch.Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is nn.functional.dropout and result is not args[0]:
            self.masks.append((result != 0)[args[0] != 0].float())
        elif function is torch.Tensor.uniform_:
            self.noise.append(result.detach().clone())
        return result


def drawn_in(model: nn.Module, batch: dict[str, Any]) -> Draws:
    with Draws() as draws:
        model(**batch)
    return draws


def correlation(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    """Of the draws of two ranks, each of mean 0 and variance 1: 1 if they are the same."""
    pairs = []
    for mine, other in zip(first, second, strict=True):
        size = min(len(mine), len(other))
        both = torch.stack([mine[:size], other[:size]]).float()
        pairs.append((both - both.mean(1, keepdim=True)) / both.std(1, keepdim=True))
    return float(torch.corrcoef(torch.cat(pairs, 1))[0, 1])


# A family for every key that draws for tokens, and how often it does in four layers.
KEYS: dict[str, tuple[str, int]] = {
    "dropout": ("opt", 8),
    "embd_pdrop": ("gpt2", 1),
    "embedding_dropout": ("starcoder2", 1),
    "hidden_dropout": ("gpt_neox", 9),
    "hidden_dropout_prob": ("bert", 9),
    "mlp_dropout": ("modernbert-decoder", 4),
    "resid_pdrop": ("gpt2", 8),
    "residual_dropout": ("starcoder2", 8),
    "router_jitter_noise": ("mixtral", 4),
    "input_jitter_noise": ("phimoe", 12),
    "lora_dropout": ("qwen3", 12),
}


def drawn(key: str, data: int, part: str = "") -> list[torch.Tensor]:
    mesh = mesh_of(2, 1) if data == 1 else init_mesh(data=2, device_type="cpu")
    family, _ = KEYS[key]
    if key == "lora_dropout":
        model = adapted("LORA", lora_dropout=0.5, r=4, **TARGETS)
    else:
        still = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0} if family == "bert" else {}
        model = tiny_model(tiny_config(read_config(family), **(still | {key: 0.5})))
    parallelize(model.train(), mesh)
    torch.manual_seed(0)
    batch = batch_on(mesh, EQUAL, "contiguous")
    if part:
        batch = {name: batch[name] for name in ("input_ids", "position_ids", "cu_seq_lens_q", "use_cache")}
    draws = drawn_in(model.get_submodule(part), batch)
    assert not (draws.masks and draws.noise)
    return [mask.flatten() for mask in (draws.masks or draws.noise)]


@pytest.mark.parametrize(
    ("key", "data", "part"),
    [*((key, 1, "") for key in KEYS), ("resid_pdrop", 2, ""), ("resid_pdrop", 1, "transformer")],
)
def test_ranks_draw_apart(pool: Pools, key: str, data: int, part: str) -> None:
    """Shards of equal size and generators of equal state: were the draws equal, so were all their elements."""
    first, second = pool(2).run(drawn, key, data, part)
    assert len(first) == len(second) == KEYS[key][1]
    assert abs(correlation(first, second)) < 0.1


def drawn_by_adapters() -> list[torch.Tensor]:
    """`from_pretrained` leaves a model in evaluation mode, PEFT's new layers are in training mode."""
    model = adapted("LORA", lora_dropout=0.5, r=4, **TARGETS).eval()
    for path, layer in model.named_modules():
        layer.training = "lora_dropout" in path
    parallelize(model, mesh_of(2, 1))
    torch.manual_seed(0)
    return drawn_in(model, batch_on(mesh_of(2, 1), EQUAL, "contiguous")).masks


def test_adapters_alone_in_training(pool: Pools) -> None:
    first, second = pool(2).run(drawn_by_adapters)
    assert len(first) == len(second) == 12
    assert abs(correlation(first, second)) < 0.1


def test_every_key_that_draws_is_looked_at() -> None:
    assert set(TOKEN_KEYS) == set(KEYS) - {"lora_dropout"}


def outside(training: bool) -> list[torch.Tensor]:
    """States of the generator before, after, and after steps whose shards are unequal."""
    model = gpt2().train(training)
    parallelize(model, mesh_of(2, 1))
    torch.manual_seed(0)
    states = [torch.get_rng_state()]
    for _ in range(2):
        model(**batch_on(mesh_of(2, 1), UNEQUAL, "zigzag")).loss.backward()
        states.append(torch.get_rng_state())
    return states


def test_the_generator_outside_stays_equal(pool: Pools) -> None:
    """So do collators that draw from it, whatever a rank's layers drew."""
    first, second = pool(2).run(outside, True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])
    for state in pool(2).run(outside, False)[0]:  # evaluation draws nothing
        assert torch.equal(state, first[0])


def losses(stop: int) -> list[float]:
    """Of five steps, with the state of the generator taken out and put back as a resumed run does."""
    model = gpt2()
    parallelize(model, mesh_of(2, 1))
    torch.manual_seed(0)
    found = []
    for step in range(5):
        if step == stop:
            state = torch.get_rng_state()
            torch.manual_seed(99)
            model = gpt2()
            parallelize(model, mesh_of(2, 1))
            torch.set_rng_state(state)
        found.append(model(**batch_on(mesh_of(2, 1), UNEQUAL, "zigzag")).loss.item())
    return found


def test_a_run_repeats_from_its_seed_and_its_checkpoint(pool: Pools) -> None:
    whole = pool(2).run(losses, -1)[0]
    assert len(set(whole)) == 5
    assert pool(2).run(losses, -1)[0] == whole
    assert pool(2).run(losses, 3)[0] == whole


def gradients(reentrant: bool | None) -> list[torch.Tensor]:
    model = gpt2()
    parallelize(model, mesh_of(2, 1))
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(0)
    model(**batch_on(mesh_of(2, 1), UNEQUAL, "zigzag")).loss.backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layers_draw_the_same(pool: Pools, reentrant: bool) -> None:
    for kept, recomputed in zip(pool(2).run(gradients, None), pool(2).run(gradients, reentrant), strict=True):
        for expected, found in zip(kept, recomputed, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def mean_loss(parallel: bool) -> tuple[float, float]:
    """Over 200 forward passes, and its standard error."""
    model = tiny_model(tiny_config(read_config("gpt2"), resid_pdrop=0.5, embd_pdrop=0.5, num_hidden_layers=1)).train()
    keywords: dict[str, Any] = {"input_ids": IDS, "labels": IDS, "use_cache": False}
    if parallel:
        parallelize(model, mesh_of(2, 1))
        keywords = batch_on(mesh_of(2, 1), EQUAL, "zigzag")
    torch.manual_seed(0)
    with torch.no_grad():
        found = torch.stack([model(**keywords).loss for _ in range(200)])
    return found.mean().item(), found.std().item() / 200**0.5


def test_dropout_on_two_ranks_has_the_expected_loss_of_one(pool: Pools) -> None:
    (alone, error), (together, other_error) = pool(1).run(mean_loss, False)[0], pool(2).run(mean_loss, True)[0]
    assert together == pytest.approx(alone, abs=3 * (error**2 + other_error**2) ** 0.5)
    assert other_error == pytest.approx(error, rel=0.3)


def after_an_error() -> bool:
    """A forward pass that fails has drawn as one that ends."""
    model = gpt2()
    parallelize(model, mesh_of(2, 1))
    batch = batch_on(mesh_of(2, 1), EQUAL, "zigzag")
    torch.manual_seed(0)
    model(**batch)
    expected = torch.get_rng_state()
    torch.manual_seed(0)
    hook = model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    hook.remove()
    return torch.equal(torch.get_rng_state(), expected)


def test_a_forward_pass_that_fails(pool: Pools) -> None:
    assert pool(2).run(after_an_error) == [True, True]


def drops_layers(when: str) -> None:
    model = tiny_model(tiny_config(read_config("opt"), layerdrop=0.5 if when == "before" else 0.0)).train()
    if when == "attribute":
        model.model.decoder.layerdrop = 0.5
    parallelize(model, mesh_of(2, 1))
    if when == "after":
        model(**batch_on(mesh_of(2, 1), EQUAL, "zigzag"))
        model.model.decoder.layerdrop = 0.5
    model(**batch_on(mesh_of(2, 1), EQUAL, "zigzag"))


@pytest.mark.parametrize("when", ["before", "attribute", "after"])
def test_layers_that_are_dropped_at_random(pool: Pools, when: str) -> None:
    with pytest.raises(NotImplementedError, match=r"OPTForCausalLM has layerdrop=0.5"):
        pool(2).run(drops_layers, when)


def noisy_embeddings(when: str) -> None:
    from transformers.integrations.neftune import activate_neftune

    model = gpt2()
    if when == "before":
        activate_neftune(model, 5.0)
    parallelize(model, mesh_of(2, 1))
    if when == "after":
        activate_neftune(model, 5.0)
    model(**batch_on(mesh_of(2, 1), EQUAL, "zigzag"))


@pytest.mark.parametrize("when", ["before", "after"])
def test_neftune_is_refused(pool: Pools, when: str) -> None:
    with pytest.raises(NotImplementedError, match=r"GPT2LMHeadModel has neftune_noise_alpha=5.0"):
        pool(2).run(noisy_embeddings, when)


def on_devices() -> list[torch.Tensor]:
    mesh = mesh_of(2, 1, "cuda")
    model = gpt2().to(mesh.device, torch.bfloat16)
    parallelize(model, mesh)
    local = batch_on(mesh, EQUAL, "zigzag")
    batch = {name: x.to(mesh.device) if isinstance(x, torch.Tensor) else x for name, x in local.items()}
    torch.manual_seed(0)
    host = torch.get_rng_state()
    found = drawn_in(model, batch).masks
    assert torch.equal(torch.get_rng_state(), host)
    return [*found, torch.cuda.get_rng_state()]


@pytest.mark.gpu(2)
def test_devices_draw_apart(pool: Pools) -> None:
    first, second = pool(2, "cuda").run(on_devices)
    assert torch.equal(first[-1], second[-1])
    assert abs(correlation(first[:-1], second[:-1])) < 0.1
