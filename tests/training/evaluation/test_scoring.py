"""Scores of tokens, split over ranks, against one forward pass of the plain model."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from ringattn import Documents, init_mesh
from ringattn.hf import parallelize
from ringattn.memory.settings import MemorySettings
from ringattn.training.evaluation.passes import Totals, pack_documents, packs_of, scored
from ringattn.training.evaluation.scoring import Scorer
from tests.hf.families import model_of
from tests.parallel.ranks import mesh_of
from tests.pool import Pools

LENGTHS = (40, 1, 2, 100, 7, 30)


def documents() -> list[Any]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 90, length) for length in LENGTHS]


def plain(model: Any) -> list[tuple[float, int]]:
    """(sum of log-probabilities, tokens chosen) of each document, alone and in one piece."""
    found = []
    for ids in documents():
        with torch.no_grad():
            logits = model(torch.from_numpy(ids)[None]).logits[0].float()
        targets = torch.from_numpy(ids[1:])
        logprob = torch.log_softmax(logits[:-1], -1).gather(1, targets[:, None]).sum()
        found.append((float(logprob), int((logits[:-1].argmax(-1) == targets).sum())))
    return found


def together(family: str, ring: int, data: int, room: int, memory: MemorySettings | None) -> tuple[Any, Any, Any]:
    mesh = init_mesh(data=data, ring=ring, ulysses=1, device_type="cpu") if data > 1 else mesh_of(ring, 1)
    model = copy.deepcopy(model_of(family))
    parallelize(model, mesh, memory)
    model.train()
    ids = documents()
    scorer, totals = Scorer(model, mesh, tile=16), Totals(len(ids), mesh)
    packs = pack_documents(LENGTHS, lambda number: ids[number], lambda number: np.full(LENGTHS[number], number), room)
    for local in scored(scorer, packs):
        totals.add(local)
    assert model.training
    return totals.over_ranks()


@pytest.mark.parametrize(
    ("family", "ring", "data", "room", "memory"),
    [
        ("llama", 1, 1, 1000, None),
        ("llama", 2, 1, 60, None),
        ("gemma2", 2, 1, 100, MemorySettings(loss_tile=8, keep="attention")),  # softcapped logits
        ("gemma2", 2, 1, 100, None),
        ("llama", 1, 2, 60, MemorySettings(loss_tile=8, mlp_tile=8)),  # three packs for two replicas
    ],
)
def test_scores_are_those_of_each_document_alone(
    pool: Pools, family: str, ring: int, data: int, room: int, memory: MemorySettings | None
) -> None:
    expected = plain(model_of(family))
    found = pool(ring * data).run(together, family, ring, data, room, memory)
    for logprob, chosen, count in found:
        assert logprob == pytest.approx([one for one, _ in expected], rel=1e-4, abs=1e-5)
        assert chosen.tolist() == [one for _, one in expected]
        assert count.tolist() == [length - 1 for length in LENGTHS]


def test_packs_keep_the_order_and_the_room() -> None:
    assert packs_of(LENGTHS, 60) == [(0, 1, 2), (3,), (4, 5)]
    assert packs_of((), 60) == []
    assert packs_of((0, 0, 61, 0), 60) == [(0, 1), (2,), (3,)]


def head_after(ring: int) -> bool:
    """Whether a tiled loss is in the head again after scoring, and after scoring failed."""
    mesh, model = mesh_of(ring, 1), copy.deepcopy(model_of("llama"))
    handle = parallelize(model, mesh, MemorySettings(loss_tile=8))
    assert handle.memory is not None
    before = handle.memory.head
    scorer = Scorer(model, mesh)
    layout = scorer.layout(Documents([8]))
    ids = layout.shard(torch.arange(8))
    scorer(layout, ids, ids)
    with pytest.raises(ValueError, match="one row"):
        scorer(layout, torch.arange(9), ids)
    return model.lm_head.__dict__["forward"] is before


def test_the_head_is_as_it_was(pool: Pools) -> None:
    assert pool(1).run(head_after, 1) == [True]
