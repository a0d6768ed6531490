"""Greedy decoding with keys split over the sequence ranks: for evaluation, of tasks whose answers must be generated.

The prompts run through the model once, split over the ranks as in training, and each rank keeps the keys that it holds
(`ringattn.hf.cached`). It is no server: documents are decoded together from the first token to the last.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.documents import Documents
from ringattn.hf.cached import DecodeStep, KeyCache
from ringattn.hf.model import unwrapped
from ringattn.training.evaluation.passes import Ids
from ringattn.training.evaluation.scoring import Scorer, evaluating


@dataclass(frozen=True)
class Decoded:
    """What was decoded, the same on every sequence rank.

    Arguments:
        tokens: (documents, new tokens) int64. What follows an end-of-sequence token means nothing.
        logits: (new tokens, documents, V) of each step, or None.
    """

    tokens: Tensor
    logits: Tensor | None


def decode(
    scorer: Scorer,
    prompts: Sequence[Ids],
    new_tokens: int,
    stop: int | None = None,
    keep_logits: bool = False,
) -> Decoded:
    """The most probable continuation of each prompt, token by token. Collective over all ranks, replicas included.

    Every replica may have prompts of its own, but `new_tokens` must be the same. Decoding ends early when every prompt
    of every replica has had the token `stop`.

    Raises ValueError for an empty prompt, no prompt or less than one token, and NotImplementedError for a model whose
    attention is not causal or whose positions end before the answers do.
    """
    _check(prompts, new_tokens)
    steps = _Steps(scorer, prompts, new_tokens)
    logits = steps.first()
    kept, tokens = [logits], [steps.best(logits)]
    done = torch.eq(tokens[0], -1 if stop is None else stop)
    for number in range(new_tokens - 1):
        if stop is not None and _all_done(done):
            break
        logits = steps.next(tokens[-1], number)
        if keep_logits:
            kept.append(logits)
        tokens.append(steps.best(logits))
        done |= torch.eq(tokens[-1], -1 if stop is None else stop)
    return Decoded(torch.stack(tokens, 1).cpu(), torch.stack(kept).cpu() if keep_logits else None)


class _Steps:
    """The forward passes of a decoding."""

    def __init__(self, scorer: Scorer, prompts: Sequence[Ids], new_tokens: int) -> None:
        self.scorer, self.mesh = scorer, scorer.mesh
        self.handle = unwrapped(scorer.model)._ringattn
        self.lengths = [len(prompt) for prompt in prompts]
        _check_limits(self.handle, max(self.lengths) + new_tokens)
        self.layout = scorer.layout(Documents(self.lengths))
        self.ids = self.layout.shard(torch.cat([torch.as_tensor(prompt) for prompt in prompts]))
        self.cache = KeyCache(self.layout, self.mesh, new_tokens)

    def first(self) -> Tensor:
        """Logits (documents, V) after the prompts, whose keys are kept."""
        starts = torch.tensor(self.layout.docs.starts, device="cpu")
        ends = starts + torch.tensor(self.lengths, device="cpu") - 1
        place = torch.full((self.layout.docs.total,), -1, device="cpu")  # where a token of the stream is on this rank
        place[self.layout.indices()] = torch.arange(self.layout.tokens(), device="cpu")
        rows = place[ends]
        here = rows >= 0
        found: list[Tensor] = []

        def look(hidden: Tensor, logits_of: Callable[[Tensor], Tensor]) -> None:
            # A rank without any end has logits of no rows, whose width it needs.
            found.append(logits_of(hidden[rows[here].to(hidden.device)]))

        self.handle.cache = self.cache
        try:
            with self.scorer.head.shown_to(look):
                self.scorer.forward(self.layout, self.ids)
        finally:
            self.handle.cache = None
        logits = found[0].new_zeros(len(ends), found[0].shape[-1])
        logits[here.to(logits.device)] = found[0]
        # As many rows as prompts, each of which one rank has.
        dist.all_reduce(logits, group=self.mesh.sequence_group)
        return logits

    def next(self, tokens: Tensor, number: int) -> Tensor:
        """Logits (documents, V) after new token `number` of each document, (documents,)."""
        found: list[Tensor] = []

        def look(hidden: Tensor, logits_of: Callable[[Tensor], Tensor]) -> None:
            found.append(logits_of(hidden))

        positions = torch.tensor(self.lengths, device=self.mesh.device) + number
        with evaluating(self.scorer.model), torch.no_grad(), self.scorer.head.shown_to(look):
            self.scorer.model(
                input_ids=tokens[None],
                position_ids=positions[None],
                use_cache=False,
                cu_seq_lens_q=DecodeStep(self.cache, number),
            )
        return found[0]

    def best(self, logits: Tensor) -> Tensor:
        """The most probable tokens (documents,), as the first sequence rank finds them."""
        tokens = logits.argmax(-1)
        group = self.mesh.sequence_group
        dist.broadcast(tokens, dist.get_global_rank(group, 0), group=group)
        return tokens


def _all_done(done: Tensor) -> bool:
    """Whether every document of every replica is complete. Collective over all ranks."""
    left = (~done).sum()
    dist.all_reduce(left)
    return not int(left)


def _check(prompts: Sequence[Ids], new_tokens: int) -> None:
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    if empty := [number for number, prompt in enumerate(prompts) if not len(prompt)]:
        raise ValueError(f"prompts must have a token each, got none in prompt {empty[0]}")
    if not isinstance(new_tokens, int) or isinstance(new_tokens, bool) or new_tokens < 1:
        raise ValueError(f"new_tokens must be an integer of at least 1, got {new_tokens!r}")


def _check_limits(handle: Any, longest: int) -> None:
    """Raises NotImplementedError where the model computes otherwise for long inputs, or ends before."""
    for limit in handle.limits:
        if longest > limit.longest:
            raise NotImplementedError(
                f"{limit.name} changes with the length that one call sees: decoding is exact up to {limit.longest} "
                f"tokens with the answer, got {longest}"
            )
