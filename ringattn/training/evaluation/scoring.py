"""What a model says of given tokens: the log-probability of each, and whether it would have been the model's choice.

Forward passes on packed documents, split over the sequence ranks as in training. Each rank scores the tokens that it
holds; nothing is gathered here.

Legend: T tokens of a pack, t of this rank, V words.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ringattn.documents import Documents
from ringattn.hf import attention_kwargs
from ringattn.hf.model import unwrapped
from ringattn.hf.shape import weighed_layers
from ringattn.parallel.layout import Layout
from ringattn.parallel.mesh.mesh import SequenceMesh
from ringattn.recurrent.weighing import weighed_layout
from ringattn.training.evaluation.head import Head
from ringattn.training.packs.packing import NO_TARGET

TILE = 1024
"""Tokens whose logits are alive at a time: half a GiB at 128,256 words."""


@dataclass(frozen=True)
class TokenScores:
    """Of this rank's t tokens; the score of a token is that of its target, the token that follows it.

    Arguments:
        logprob: (t,) float32, natural logarithm; 0 where there is no target.
        chosen: (t,) bool, whether the target is the most probable token; False where there is no target.
    """

    logprob: Tensor
    chosen: Tensor


class Scorer:
    """Scores packs with a parallelized model. A call is collective over all ranks, with as many calls on each.

    Arguments:
        model: as the engine calls it; it is put into evaluation mode while it scores.
        mesh: that it was parallelized on.
        policy: of layouts.
        tile: tokens whose logits are alive at a time.

    Raises NotImplementedError for a head that cannot be looked at, see `Head`.
    """

    def __init__(self, model: nn.Module, mesh: SequenceMesh, policy: str = "auto", tile: int = TILE) -> None:
        self.model, self.mesh, self.policy, self.tile = model, mesh, policy, tile
        self.head, self._layers = Head(model), weighed_layers(unwrapped(model))

    def layout(self, docs: Documents) -> Layout:
        """Where the tokens of a pack are."""
        return weighed_layout(docs, self.mesh, self.policy, self._layers)

    def __call__(self, layout: Layout, ids: Tensor, targets: Tensor) -> TokenScores:
        """Scores this rank's tokens of a pack.

        Arguments:
            ids, targets: (t,) int64; targets are shifted already, -100 for none.
        """
        device = self.mesh.device
        targets = targets.to(device)
        logprob = torch.zeros(len(targets), device=device)
        chosen = torch.zeros(len(targets), dtype=torch.bool, device=device)
        rows = (targets != NO_TARGET).nonzero()[:, 0]

        def look(hidden: Tensor, logits_of: Callable[[Tensor], Tensor]) -> None:
            for some in rows.split(self.tile):
                logits, wanted = logits_of(hidden[some]), targets[some]
                logprob[some] = torch.log_softmax(logits, -1).gather(1, wanted[:, None])[:, 0].float()
                chosen[some] = logits.argmax(-1) == wanted

        with self.head.shown_to(look):
            self.forward(layout, ids)
        return TokenScores(logprob, chosen)

    def forward(self, layout: Layout, ids: Tensor) -> None:
        """A forward pass without gradients, in evaluation mode."""
        device = self.mesh.device
        with evaluating(self.model), torch.no_grad():
            self.model(
                input_ids=ids[None].to(device),
                position_ids=layout.position_ids(device)[None],
                use_cache=False,
                **attention_kwargs(layout),
            )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and the modes as they were afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
