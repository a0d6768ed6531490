"""Saving a parallelized model: what is written is the plain model, and a pickled one says what to do."""

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

from ringattn.hf import parallelize, shard_batch
from ringattn.hf.conformance import FORMS, alone
from ringattn.hf.tiny import read_config, tiny_config, tiny_model
from tests.parallel.ranks import mesh_of
from tests.pool import Pools

FORM = FORMS[3]


def fresh(family: str = "llama") -> Any:
    return tiny_model(tiny_config(read_config(family)))


def local_batch() -> dict[str, Any]:
    return shard_batch(FORM.batch(97), None, mesh_of(2, 1))


def saved(folder: str) -> None:
    plain, model = fresh(), fresh()
    parallelize(model, mesh_of(2, 1))
    model(**local_batch()).loss.backward()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(x, plain.state_dict()[name]) for name, x in model.state_dict().items())
    own = Path(folder)
    model.save_pretrained(own)  # rank 0 writes
    dist.barrier()
    configuration = own / f"configuration of {dist.get_rank()}"
    model.config.save_pretrained(configuration)
    for text in (own / "config.json", configuration / "config.json"):
        assert "ringattn" not in text.read_text()
        assert "attn_implementation" not in text.read_text()
    assert "ringattn" not in model.config.to_json_string()
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(own)
    assert loaded.config._attn_implementation != "ringattn"
    assert not hasattr(loaded, "_ringattn")
    assert alone(loaded.eval(), FORM).loss.item() == pytest.approx(alone(plain, FORM).loss.item(), rel=1e-6)


def test_save_pretrained_writes_the_plain_model(pool: Pools, tmp_path: Path) -> None:
    pool(2).run(saved, str(tmp_path))


def unpickled(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(family: str) -> list[float]:
    """Losses on ranks before and after, and of the plain model that is left."""
    model = fresh(family)
    parallelize(model, mesh_of(2, 1))
    losses = [model(**local_batch()).loss.item()]
    other = unpickled(model)
    with pytest.raises(ValueError, match=r"was pickled \(torch.save\) while it was parallelized"):
        other(**local_batch())
    handle = parallelize(other, mesh_of(2, 1))
    losses.append(other(**local_batch()).loss.item())
    handle.undo()
    losses.append(alone(other, FORM).loss.item())
    other = unpickled(model)
    other._ringattn.undo()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in other.modules())
    assert not any("_ringattn" in vars(part) for part in other.modules())
    assert other.config._attn_implementation == "eager"
    losses.append(alone(other, FORM).loss.item())
    losses.append(model(**local_batch()).loss.item())  # the one that was pickled goes on
    return losses


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_pickled_model_computes_the_same_losses(pool: Pools, family: str) -> None:
    for losses in pool(2).run(pickled, family):
        assert losses == pytest.approx([losses[0]] * 5, rel=1e-6)


def read_elsewhere(content: bytes) -> float:
    """By a process without a mesh."""
    model = pickle.loads(content)
    model._ringattn.undo()
    return float(alone(model, FORM).loss)


def written() -> bytes:
    model = fresh()
    parallelize(model, mesh_of(2, 1))
    return pickle.dumps(model)


def test_a_model_written_by_ranks_is_read_without_them(pool: Pools) -> None:
    assert read_elsewhere(pool(2).run(written)[0]) == pytest.approx(float(alone(fresh(), FORM).loss), rel=1e-6)
