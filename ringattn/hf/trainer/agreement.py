"""What ranks must agree on before a step: one small exchange in which every rank of a sequence shows its batches.

A replica that has run out of batches while others have some goes on with idle ones: the same tensors without targets.
One whose batch has no images while others' have takes one of theirs, which counts nowhere: weights of the tower are
gathered, and its gradients averaged, where all replicas run it.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.hf.loss import IGNORE_INDEX
from ringattn.hf.trainer.randomness import set_aside
from ringattn.hf.vision import MEDIA, STAND_IN, Medium, smallest_image
from ringattn.parallel.mesh.mesh import SequenceMesh

Batch = Mapping[str, Any]
Check = Callable[[Batch], None]
CONTROL = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")
LOWEST = torch.iinfo(torch.int64).min


class Idle(dict[str, Any]):
    """A batch without targets: its replica takes part in what others compute, and adds nothing."""


def in_step(batches: Iterator[Batch], wanted: int, mesh: SequenceMesh, check: Check, fill: bool = False) -> list[Batch]:
    """The next `wanted` batches, as many on every replica. Collective over all ranks.

    Replicas take as many as the one that has most, or `wanted` where any has one and `fill` asks for it; idle batches
    stand for those that a replica has not. An empty list, on every rank, says that no replica has a batch left.

    Arguments:
        check: raises ValueError for a batch that the model cannot take.

    Raises ValueError on every rank if the ranks of a sequence do not hold the same batches, and, on every rank, what a
    rank met when it read its batches (RuntimeError with rank and message on the others).
    """
    found, error = _read(batches, wanted, check)
    counts, images = agree(found, mesh, error)
    longest = max(counts)
    if longest == 0:
        return []
    if 0 in counts:
        source = next(rank for rank, count in enumerate(counts) if count)
        sample = _from_replica(source, found, mesh)
    else:
        sample = found[-1]
    missing = (wanted if fill else longest) - len(found)
    filled = found + [idle(found[-1] if found else sample) for _ in range(missing)]
    return _with_images(filled, mesh) if images and mesh.data > 1 else filled


def agree(batches: Sequence[Batch], mesh: SequenceMesh, error: Exception | None = None) -> tuple[list[int], bool]:
    """How many batches each replica has, and whether any has images.

    Collective over all ranks; see `in_step` for what it raises.
    """
    content = fingerprint(batches) if mesh.sequence_size > 1 else 0
    mine = [
        len(batches),
        content,
        int(error is not None),
        int(any(medium.given(batch) for medium in MEDIA for batch in batches)),
    ]
    table = torch.full((mesh.data, 2 * len(mine)), LOWEST, device="cpu")
    table[mesh.data_rank] = torch.tensor([sign * number for number in mine for sign in (1, -1)], device="cpu")
    table = table.to(mesh.device)
    dist.all_reduce(table, dist.ReduceOp.MAX)
    replicas = table.tolist()
    if any(replica[4] for replica in replicas):
        _raise_first(error)
    differ = [number for number, (most, least, high, low, *_) in enumerate(replicas) if most != -least or high != -low]
    if differ:
        raise ValueError(
            f"the ranks that share a sequence got different batches: {_differences(batches, differ[0], mesh)}. The "
            "data set, its order and the collator must be the same on every rank, and so must their seeds"
        )
    return [replica[0] for replica in replicas], any(replica[6] for replica in replicas)


def agree_on_control(control: Any, mesh: SequenceMesh) -> None:
    """What a callback decides on one rank (by its clock, say) is decided on all: else they would wait for each other.

    Collective over all ranks.
    """
    asked = torch.tensor([getattr(control, name) for name in CONTROL], dtype=torch.int64, device=mesh.device)
    dist.all_reduce(asked, dist.ReduceOp.MAX)
    for name, value in zip(CONTROL, asked.tolist(), strict=True):
        setattr(control, name, bool(value))


def check_averaged(norm: float, mesh: SequenceMesh) -> None:
    """Raises RuntimeError on every rank if the norms of their gradients differ. Collective over all ranks."""
    norms = torch.tensor([norm, -norm], dtype=torch.float64, device=mesh.device)
    dist.all_reduce(norms, dist.ReduceOp.MAX)
    most, least = norms[0].item(), -norms[1].item()
    if most - least > 1e-3 * most:
        raise RuntimeError(
            f"gradients differ between ranks, their norms are {least:.6g} to {most:.6g}: nothing averages them over "
            "all ranks, as DistributedDataParallel, FSDP2 and DeepSpeed do"
        )


def check_any_target(batches: Sequence[Batch], targets: Tensor, mesh: SequenceMesh) -> None:
    """Raises ValueError on every rank if a step has no target: labels that are ignored everywhere teach nothing.

    Collective over all ranks.

    Arguments:
        targets: how many the batches of this replica have.
    """
    rows = sum(len(batch["labels"]) for batch in batches if batch.get("labels") is not None)
    total = torch.stack([targets.detach().to(mesh.device, torch.int64), torch.tensor(rows, device=mesh.device)])
    dist.all_reduce(total)
    found, labelled = total.tolist()
    if found == 0 and labelled:  # a batch without labels is refused by who needs them
        raise ValueError(
            f"the first step has nothing to learn: labels are {IGNORE_INDEX} for every token that another one of its "
            f"document precedes, in all {rows} rows of this rank and on every other. What makes the labels (an "
            "assistant mask, a template for responses, a limit of the length) matched none of them"
        )


def fingerprint(batches: Sequence[Batch]) -> int:
    """62 bits of everything in the batches: names, types, shapes, values."""
    digest = hashlib.blake2b(digest_size=8)
    _feed(digest, list(batches))
    return int.from_bytes(digest.digest(), "big") >> 2


def idle(batch: Batch) -> Idle:
    """The same tensors, and no targets."""
    labels = {name: torch.full_like(batch[name], IGNORE_INDEX) for name in ("labels", "shift_labels") if name in batch}
    return Idle({**batch, **labels})


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, np.ndarray) and value.dtype != object:
        value = torch.from_numpy(value)
    if isinstance(value, Tensor):
        digest.update(repr((value.dtype, tuple(value.shape))).encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)} of".encode())
        for entry in value:
            _feed(digest, entry)
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            _feed(digest, key)
            _feed(digest, value[key])
    elif value is None or isinstance(value, str | bytes | int | float):
        digest.update(repr(value).encode())
    else:  # its text may hold an address
        digest.update(type(value).__name__.encode())


def _read(batches: Iterator[Batch], wanted: int, check: Check) -> tuple[list[Batch], Exception | None]:
    found: list[Batch] = []
    with set_aside():
        try:
            while len(found) < wanted:
                batch = next(batches)
                if not isinstance(batch, Mapping):
                    raise ValueError(f"data_collator must return a dictionary of tensors, got {type(batch).__name__}")
                check(batch)
                found.append(batch)
        except StopIteration:
            pass
        except Exception as error:
            return [], error
    return found, None


def _from_replica(source: int, batches: Sequence[Batch], mesh: SequenceMesh) -> Batch:
    """A batch of the replica `source`, for those that have none to make idle ones of. Collective over replicas."""
    box: list[Any] = [None]
    if mesh.data_rank == source:
        box[0] = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in batches[-1].items()}
    dist.broadcast_object_list(box, group=mesh.device_mesh.get_group("data"), group_src=source, device=mesh.device)
    return box[0]


def _with_images(batches: list[Batch], mesh: SequenceMesh) -> list[Batch]:
    """The batches, with an image or video of another replica in those that have none while others have. Collective."""
    table = torch.zeros(mesh.data, len(batches), len(MEDIA), dtype=torch.int64, device="cpu")
    table[mesh.data_rank] = torch.tensor([[medium.given(batch) for medium in MEDIA] for batch in batches], device="cpu")
    table = table.to(mesh.device)
    dist.all_reduce(table, dist.ReduceOp.MAX)
    out = []
    for batch, having in zip(batches, table.permute(1, 2, 0).tolist(), strict=True):
        for medium, replicas in zip(MEDIA, having, strict=True):
            if 0 < sum(replicas) < mesh.data:
                batch = _with_stand_in(batch, medium, replicas, mesh)
        out.append(batch)
    return out


def _with_stand_in(batch: Batch, medium: Medium, replicas: list[int], mesh: SequenceMesh) -> Batch:
    """The batch, with the smallest of the first replica that has any if this one has none. Collective over replicas.

    Arguments:
        replicas: 1 for those that have any.
    """
    source, box = replicas.index(1), list[Any]([None])
    if mesh.data_rank == source:
        box[0] = {name: x.cpu() for name, x in smallest_image(batch, medium).items()}
    group = mesh.device_mesh.get_group("data")
    dist.broadcast_object_list(box, group=group, group_src=source, device=mesh.device)
    if replicas[mesh.data_rank]:
        return batch
    filled = {**batch, STAND_IN: {**batch.get(STAND_IN, {}), **box[0]}}
    return Idle(filled) if isinstance(batch, Idle) else filled


def _raise_first(error: Exception | None) -> None:
    """Raises this rank's error, or tells of another's. Collective over all ranks."""
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    rank = next(rank for rank, message in enumerate(told) if message is not None)
    raise RuntimeError(f"rank {rank} could not read its batch: {told[rank]}")


def _differences(batches: Sequence[Batch], replica: int, mesh: SequenceMesh) -> str:
    """What differs between the ranks of a replica. Collective over all ranks."""
    mine = {"number of batches": len(batches)}
    for number, batch in enumerate(batches):
        mine |= {f"{name} of batch {number}": fingerprint([{name: batch[name]}]) for name in batch}
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    start = replica * mesh.sequence_size
    shown: list[dict[str, int]] = told[start : start + mesh.sequence_size]
    names = sorted({name for rank in shown for name in rank})
    differ = [name for name in names if len({rank.get(name) for rank in shown}) > 1]
    return f"{', '.join(differ)} differ on ranks {start} to {start + mesh.sequence_size - 1}"
