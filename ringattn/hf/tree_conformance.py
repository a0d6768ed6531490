"""Is a parallelized model the model on sequences with common prefixes, each prefix computed once? Every sequence run
alone is the truth.

n tokens of a sequence, N of all.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ringattn.hf.conformance import Outcome, averaged_gradients, gradients_of, vocabulary_of, wide
from ringattn.hf.trees import sequence_logprobs, shard_trees
from ringattn.parallel.mesh.mesh import SequenceMesh
from ringattn.trees import Trees


def sequences_for(model: Any, longest: int = 7) -> list[Tensor]:
    """Random sequences: completions of a prompt of `longest` tokens, some of which part after a turn more; that turn
    itself; and one by itself."""
    generator = torch.Generator().manual_seed(2)
    sizes = longest, 5, 4, 6, 3, longest + 2
    prompt, turn, first, second, third, other = (
        torch.randint(3, vocabulary_of(model), (size,), generator=generator) for size in sizes
    )
    runs = (prompt, first), (prompt, turn, second), (prompt, turn, third), (prompt, turn), (other,)
    return [torch.cat(one) for one in runs]


def sequences_alone(model: Any, sequences: Sequence[Tensor]) -> Outcome:
    """Each by itself. Log-probabilities of all tokens but the first ones, (N - sequences, 1), stand for logits."""
    model.zero_grad()
    told = []
    for one in sequences:
        ids = one.to(model.device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        told.append(wide(logits).log_softmax(-1).gather(1, ids[1:, None]))
    loss = -torch.cat(told).mean()
    loss.backward()
    return Outcome(torch.cat(told).detach(), loss.detach(), gradients_of(model))


def sequences_together(model: Any, mesh: SequenceMesh, sequences: Sequence[Tensor], policy: str = "auto") -> Outcome:
    """The same as trees, through a model that is parallelized with a tiled loss. Collective."""
    model.zero_grad()
    trees = Trees(sequences)
    batch = shard_trees(trees, mesh, policy)
    loss = model(**batch).loss
    loss.backward()
    gradients = averaged_gradients(model)
    with torch.no_grad():
        told = sequence_logprobs(model, batch, trees)
    return Outcome(torch.cat(told)[:, None], loss.detach(), gradients)
