"""Cached decoding on several ranks against transformers' `generate` on one."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from ringattn.hf import parallelize
from ringattn.training.evaluation.decoding import decode
from ringattn.training.evaluation.scoring import Scorer
from tests.hf.families import model_of
from tests.parallel.ranks import mesh_of
from tests.pool import Pools

LENGTHS = (23, 1, 60)
NEW = 9


def prompts() -> list[Any]:
    generator = np.random.default_rng(3)
    return [generator.integers(3, 90, length) for length in LENGTHS]


def generated(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (documents, NEW) and logits (NEW, documents, V) of each prompt alone."""
    tokens, logits = [], []
    model = copy.deepcopy(model)
    model.generation_config.eos_token_id = None
    for prompt in prompts():
        ids = torch.from_numpy(prompt)[None]
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens.append(found.sequences[0, ids.shape[1] :])
        logits.append(torch.cat(found.logits))
    return torch.stack(tokens), torch.stack(logits, 1)


def decoded(family: str, ring: int, ulysses: int, stop: int | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    mesh, model = mesh_of(ring, ulysses), copy.deepcopy(model_of(family))
    parallelize(model, mesh)
    found = decode(Scorer(model, mesh), prompts(), NEW, stop, keep_logits=True)
    assert model._ringattn.cache is None
    return found.tokens, found.logits


@pytest.mark.parametrize(
    ("family", "ring", "ulysses"),
    [("llama", 1, 1), ("llama", 2, 1), ("qwen3", 1, 2), ("gemma2", 2, 1), ("gpt_oss", 2, 1)],
)
def test_tokens_and_logits_are_those_of_generate(pool: Pools, family: str, ring: int, ulysses: int) -> None:
    tokens, logits = generated(model_of(family))
    assert len(set(tokens.flatten().tolist())) > 2
    for found, found_logits in pool(ring * ulysses).run(decoded, family, ring, ulysses):
        assert torch.equal(found, tokens)
        torch.testing.assert_close(found_logits, logits.float(), rtol=1e-4, atol=1e-4)


def test_it_ends_with_the_last_document(pool: Pools) -> None:
    tokens, _ = generated(model_of("llama"))
    stop = int(tokens[0, 3])
    found, _ = pool(2).run(decoded, "llama", 2, 1, stop)[0]
    ends = [(row == stop).nonzero()[:1, 0].tolist() for row in tokens]
    expected = NEW if not all(ends) else max(end[0] for end in ends) + 1
    assert torch.equal(found, tokens[:, :expected])


def refused(*arguments: Any) -> None:
    mesh, model = mesh_of(1, 1), copy.deepcopy(model_of("llama"))
    parallelize(model, mesh)
    decode(Scorer(model, mesh), *arguments)


def test_what_cannot_be_decoded(pool: Pools) -> None:
    for arguments, words in (
        (([], 3), "at least one prompt"),
        (([np.array([1]), np.array([], int)], 3), "none in prompt 1"),
        (([np.array([1])], 0), "new_tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            pool(1).run(refused, *arguments)
