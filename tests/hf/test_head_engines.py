"""Tiled heads and MLPs inside of engines: weights are gathered once, and loss and gradients are the plain model's."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

pytest.importorskip("transformers")

from ringattn.hf.head import TiledHead
from ringattn.hf.layers import decoder_layers
from ringattn.memory.tiled_rows import TiledModule
from ringattn.training.engines import EngineOptions, build_engine
from ringattn.training.engines.deepspeed import available
from ringattn.training.model.models import build_model, empty_model, model_config
from tests.parallel.ranks import mesh_of
from tests.pool import Pools
from tests.training.token_loss import backward_loss, token_loss_sum

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOKENS, WORLD = 23, 2
ENGINES = [
    ("fsdp2", 0),
    *(
        pytest.param("deepspeed", stage, marks=pytest.mark.skipif(not available(), reason="no deepspeed"))
        for stage in (1, 2, 3)
    ),
]


def tokens(rank: int) -> tuple[Tensor, Tensor]:
    """ids and targets of a rank, some of them ignored."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(0, 61, (1, TOKENS), generator=generator)
    return ids, torch.where(torch.rand(1, TOKENS, generator=generator) < 0.3, -100, ids.roll(-1))


def alone(model: nn.Module) -> tuple[float, dict[str, Tensor]]:
    """Mean loss of all ranks' targets and its gradients, of the plain model in one process."""
    total, count = torch.zeros(()), 0
    for rank in range(WORLD):
        ids, targets = tokens(rank)
        total = total + token_loss_sum(model(input_ids=ids).logits[0], targets[0])
        count += int((targets >= 0).sum())
    loss = total / count
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def gradient(parameter: nn.Parameter) -> Tensor:
    if hasattr(parameter.grad, "full_tensor"):
        return parameter.grad.full_tensor()
    from deepspeed.utils import safe_get_full_grad

    found = safe_get_full_grad(parameter)
    assert found is not None
    return found


def in_an_engine(engine: str, stage: int, tied: bool, tiles: tuple[int | None, int | None]) -> dict[str, Any]:
    """Errors of loss and gradients against the plain model, and how often the head was called."""
    mesh = mesh_of(WORLD, 1)
    config = model_config("llama", None, SIZES | {"tie_word_embeddings": tied})
    heads: list[TiledHead] = []

    def attach(model: Any) -> None:
        if tiles[0] is not None:
            heads.append(TiledHead(model, tiles[0]))
        for layer in decoder_layers(model) if tiles[1] is not None else ():
            TiledModule(layer.mlp, tiles[1])

    options = EngineOptions(
        empty=partial(empty_model, config),
        load=partial(build_model, config, 0),
        attach=attach,
        device=torch.device("cpu"),
        dtype=torch.float32,
        weight_decay=0.0,
        betas=(0.9, 0.95),
        eps=1e-8,
        clip=0.0,
        micro_steps=1,
        zero_stage=stage,
    )
    built = build_engine(engine, mesh, options)
    ids, targets = tokens(dist.get_rank())
    count = sum(int((tokens(rank)[1] >= 0).sum()) for rank in range(WORLD))
    if heads:
        heads[0].announce(targets, 1.0)
        loss = built.model(input_ids=ids, use_cache=False).logits.loss()
    else:
        loss = token_loss_sum(built.model(input_ids=ids, use_cache=False).logits[0], targets[0])
    built.backward(backward_loss(loss, count, WORLD))
    total = loss.detach().clone()
    dist.all_reduce(total)
    wanted_loss, wanted = alone(build_model(config, 0))
    errors = {"loss": abs(total.item() / count - wanted_loss) / wanted_loss}
    for name, parameter in built.model.named_parameters():
        expected = wanted[name.removeprefix("module.")]
        errors[name] = ((gradient(parameter) - expected).norm() / expected.norm()).item()
    built.step(0.0)
    return errors


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tiles", [(None, None), (4, None), (None, 5), (4, 5)], ids=["plain", "head", "mlp", "both"])
@pytest.mark.parametrize(("engine", "stage"), ENGINES)
def test_engines_give_the_plain_gradients(
    pool: Pools, engine: str, stage: int, tied: bool, tiles: tuple[int | None, int | None]
) -> None:
    for errors in pool(WORLD).run(in_an_engine, engine, stage, tied, tiles):
        assert len(errors) == (21 if tied else 22)
        assert max(errors.values()) < 1e-5, errors
