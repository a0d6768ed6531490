"""Do the ranks of a sequence hold the same batch? Each cuts its part out of its own copy of it.

A sampler that deals every rank its own rows, or shuffles by a seed of the rank, gives parts of different batches, whose
shapes fit: nothing would fail. So copies are compared before the first forward pass of a model. Later ones are not,
since an answer would wait for the device at every step; `SequenceTrainer` compares them all.
"""

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.kept import kept, kept_already
from ringattn.parallel.layout import Layout
from ringattn.parallel.mesh.mesh import SequenceMesh

_KEY = "ids of the batch"


def note_batch(layout: Layout, ids: Tensor) -> None:
    """Keep the whole batch's ids, of any shape, with its layout, for the comparison before a first forward pass."""
    kept(layout, _KEY, lambda: ids)


def check_same_batch(layout: Layout, mesh: SequenceMesh) -> None:
    """Raises ValueError on every sequence rank if these hold different documents or ids. Collective over them."""
    docs = layout.docs
    digest = hashlib.blake2b(repr((docs, layout.policy)).encode(), digest_size=7)  # with its blocks and segments
    ids = kept_already(layout, _KEY)
    checksum = 0 if ids is None else _checksum(ids)
    mine = torch.tensor([int.from_bytes(digest.digest(), "big"), checksum, docs.total], device="cpu")
    bounds = torch.cat([mine, -mine]).to(mesh.device)
    dist.all_reduce(bounds, dist.ReduceOp.MAX, group=mesh.sequence_group)
    highest, lowest = bounds.cpu().split(3)
    if torch.equal(highest, -lowest):
        return
    what = "documents" if highest[0] != -lowest[0] else "input_ids"
    raise ValueError(
        f"the ranks that share a sequence got different batches: their {what} differ ({-int(lowest[2])} to "
        f"{int(highest[2])} tokens). Every rank gives shard_batch the whole batch, the same one: the data set, its "
        "order, the collator and their seeds must be those of the replica, not of the rank"
    )


def _checksum(ids: Tensor) -> int:
    """A number that other ids, or the same ones in another order, hardly share."""
    ids = ids.flatten().to(torch.int64)
    return int(((ids + 1) * torch.arange(1, len(ids) + 1, device=ids.device)).sum())
