"""Which tokens of a multimodal model or a prefix LM see each other, by the types that its processor gives them.

transformers makes blocks of these types on the way to a mask: on a rank from the types of its own tokens, of which only
whether a token is in a block means anything. So the blocks are those of the documents, made of all tokens' types by the
same rule, and the model's are compared with them.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.documents import Documents
from ringattn.kept import keep, kept_already
from ringattn.parallel.layout import Layout
from ringattn.parallel.mesh.mesh import SequenceMesh

_KEY = "rule of its blocks"


@dataclass(frozen=True)
class BlockRule:
    """How a family makes blocks of its tokens' types.

    Arguments:
        types: of the tokens that are in blocks.
        runs: each run of such tokens is a block; else all of a document are one, and must lie side by side.
    """

    types: tuple[int, ...]
    runs: bool = True

    def blocks(self, types: Tensor, docs: Documents) -> Documents:
        """The documents with the blocks that the types (T,) of their tokens make.

        Raises ValueError where one block would stand in several places of a document.
        """
        inside = torch.isin(types.to("cpu"), torch.tensor(self.types, device="cpu"))
        if self.runs:
            return Documents.from_token_type_ids(inside.to(torch.int64), docs)
        try:
            return Documents.from_block_ids(inside.to(torch.int64) - 1, docs)
        except ValueError as error:
            raise ValueError(
                f"tokens of types {self.types} see each other in this model wherever they stand in a document, which "
                f"is supported where they stand side by side (one image, or one prefix): {error}"
            ) from None


# Read in transformers 5.24: `get_block_sequence_ids_for_mask` of Gemma 3 and 4, the forward passes of PaliGemma and
# Molmo 2, in which all images of a document are one block.
RULES = {
    "gemma3": BlockRule((1,)),
    "gemma4": BlockRule((1, 2)),
    "paligemma": BlockRule((0,), runs=False),
    "molmo2": BlockRule((1,), runs=False),
}


def block_rule(config: Any) -> BlockRule | None:
    """That of a model's configuration; None for families whose rule is not known here."""
    return RULES.get(config.model_type)


def uses_blocks(config: Any) -> bool:
    """Whether the configuration of a family that can have blocks asks for them."""
    return config.model_type != "gemma4" or config.get_text_config().use_bidirectional_attention == "vision"


def with_blocks(docs: Documents, batch: Mapping[str, Any], marks: str, rule: BlockRule | None) -> Documents:
    """The documents of a batch with the blocks that its token types make by a model's rule.

    Arguments:
        marks: the keyword of the types, "" for a model without blocks.

    Raises ValueError if the documents have other blocks.
    """
    types = batch.get(marks) if marks else None
    if not isinstance(types, Tensor) or rule is None:
        return docs
    found = rule.blocks(types.reshape(-1), docs)
    if docs.blocks not in ((), found.blocks):
        raise ValueError(f"docs and {marks} disagree about blocks: {docs.blocks[:4]} against {found.blocks[:4]}")
    return found


def note_rule(layout: Layout, rule: BlockRule | None) -> None:
    """Keep with a layout by which rule its blocks were made of all tokens' types."""
    keep(layout, _KEY, rule)


def check_blocks(layout: Layout, mesh: SequenceMesh, marks: str, rule: BlockRule | None, types: Any) -> None:
    """Raises an error on all sequence ranks where a model would make blocks that the documents do not have, or not
    those that they have. Collective over the ranks where tokens are marked.

    Arguments:
        marks: the keyword of the types, of a model that makes blocks.
        types: of this rank's tokens, (1, t); None if there are none.
    """
    if not isinstance(types, Tensor):
        if layout.docs.blocks:
            raise ValueError(f"documents have blocks, and {marks} are missing, of which this model makes its own")
        return
    if rule is not None and kept_already(layout, _KEY) == rule:
        return
    wrong = types.ne(0) if rule is None else _other_than(layout, types, rule)
    found = wrong.any().to(torch.int64).reshape(1).to(mesh.device)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=mesh.sequence_group)
    if not found.item():
        return
    if rule is None:
        raise NotImplementedError(
            f"{marks} mark tokens of an image, and those see each other in both directions in this model by a rule "
            f"that is not known (it is of {', '.join(RULES)}): its masks are not supported"
        )
    raise ValueError(
        f"{marks} mark tokens of an image or a prefix, which see each other in this model, and the documents of the "
        f"batch have other blocks or none ({layout.docs}): give shard_batch needs=handle.needs, which make them"
    )


def _other_than(layout: Layout, types: Tensor, rule: BlockRule) -> Tensor:
    """Whether the types of this rank's tokens mark others than the blocks of its documents: one or many booleans."""
    docs = layout.docs
    edges = {start for start, _ in zip(docs.starts, docs.lengths, strict=True)}
    joined = any(before[1] == after[0] and after[0] not in edges for before, after in pairwise(docs.blocks))
    owners = [bisect_right(docs.starts, start) for start, _ in docs.blocks]
    if joined or (not rule.runs and len(set(owners)) < len(owners)):
        return torch.ones(1, dtype=torch.bool, device=types.device)  # the model would make them one
    inside = torch.zeros(docs.total, dtype=torch.bool, device="cpu")
    for start, stop in docs.blocks:
        inside[start:stop] = True
    counts = torch.ones(docs.total, dtype=torch.bool, device="cpu")
    for start, stop in docs.padding:
        counts[start:stop] = False
    index = layout.indices()
    marked = torch.isin(types[0], torch.tensor(rule.types, device=types.device))
    return (marked ^ inside[index].to(types.device)) & counts[index].to(types.device)
