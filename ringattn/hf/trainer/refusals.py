"""Trainer classes that cannot be put on a mesh, refused by name with what to do instead."""

import re
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ringattn.hf.vision import MEDIA, STAND_IN
from ringattn.parallel.mesh.mesh import SequenceMesh

# Methods that OnMesh replaces without calling those of the class below it.
REPLACED = (
    "compute_loss",
    "prediction_step",
    "get_batch_samples",
    "_get_num_items_in_batch",
    "_track_num_input_tokens",
)
# What TRL's SFTTrainer has of these: the model's own loss with figures about it, and a shortcut in evaluation.
SFT = ("compute_loss", "prediction_step")
LOOP = "parallelize(model, mesh) serves a loop of your own: take "
KINDS = (
    (
        "GRPO|RLOO|PPO|Online|A2PO|GMPO|SDPO|NashMD|XPO",
        "it generates text between its steps, with logits of whole sequences, and a rank holds a part of every "
        f"sequence. {LOOP}completions of another copy of the model, and log-probabilities of shift_labels from the "
        "logits of its local tokens, brought together with layout.unshard; multiply the loss by the number of ranks "
        "where gradients are averaged over them",
    ),
    (
        "DPO|KTO|CPO|ORPO|BCO|TPO|Prefer",
        "a preference loss adds up the log-probabilities of each sequence before it compares them, and a rank holds a "
        f"part of every sequence. {LOOP}log-probabilities of shift_labels from the logits of its local tokens, bring "
        "them together with layout.unshard, add them up by document, compute the loss from these sums, and multiply it "
        "by the number of ranks where gradients are averaged over them",
    ),
    (
        "Reward|PRM",
        "its head takes a score from one token of each sequence, which is on one of the ranks. Train the reward model "
        "on a data-parallel mesh without OnMesh",
    ),
    (
        "Distill|GKD|GOLD|MiniLLM|SDFT|OPD",
        "it compares logits with those of a teacher, who sees whole sequences, and a rank holds a part of every "
        f"sequence. {LOOP}teacher and student both parallelized on the same mesh, and compare their local logits",
    ),
)
OTHER = "it is no language modelling, the only training whose loss is the same on any number of sequence ranks"


def check_class(kind: type, mixin: type) -> None:
    """Raises NotImplementedError for a Trainer class below `mixin` whose loss or evaluation would not be computed."""
    from transformers import Trainer

    below = kind.__mro__[kind.__mro__.index(mixin) + 1 :]
    if Trainer not in below:
        raise NotImplementedError(f"{kind.__name__} must derive from OnMesh and then from a transformers.Trainer")
    for each in below[: below.index(Trainer)]:
        from_trl = each.__module__.split(".")[0] == "trl"
        if from_trl and each.__name__.endswith("Trainer") and each.__name__ not in ("SFTTrainer", "_BaseTrainer"):
            raise NotImplementedError(f"{each.__name__} is not supported: {_reason(each.__name__)}")
        known = SFT if from_trl else ()
        if own := [name for name in REPLACED if name in each.__dict__ and name not in known]:
            raise NotImplementedError(
                f"{each.__name__} is not supported: OnMesh would replace its own {', '.join(own)}, and what these "
                f"compute would be lost. Define them in the class that derives from OnMesh instead: there they get "
                "the batch of the whole sequence, and super() has the loss over all its ranks"
            )


def check_place(arguments: Any, accelerator: Any, mesh: SequenceMesh) -> None:
    """Raises ValueError where Accelerate sees other devices or fewer ranks than the mesh: gradients would be lost.

    NotImplementedError for a version of FSDP that has not been tried.
    """
    if arguments.n_gpu > 1:
        raise ValueError(
            f"a process must have one device, and this one sees {arguments.n_gpu}: start it with torchrun, or make one "
            "visible by CUDA_VISIBLE_DEVICES"
        )
    ranks = dist.get_world_size()
    if (accelerator.num_processes, accelerator.device.type) != (ranks, mesh.device_type):
        raise ValueError(
            f"Accelerate must see the {ranks} processes of the mesh on {mesh.device_type}, it sees "
            f"{accelerator.num_processes} processes on {accelerator.device.type}"
            + ("; use_cpu=True tells it" if mesh.device_type == "cpu" else "")
        )
    if getattr(getattr(accelerator.state, "fsdp_plugin", None), "fsdp_version", 2) == 1:
        raise NotImplementedError("FSDP version 1 is not supported: use version 2, fsdp_config={'version': 2}")


def check_counts(arguments: Any, trainer: type) -> None:
    """Raises NotImplementedError where tokens seen would be counted once for each rank of a sequence."""
    asked = getattr(arguments, "include_num_input_tokens_seen", "no") not in (False, "no")
    if asked and not hasattr(trainer, "_track_num_input_tokens"):
        raise NotImplementedError(
            "include_num_input_tokens_seen is not supported with this version of transformers, which counts the tokens "
            "of a sequence once for each of its ranks"
        )


def check_unused(model: Any, batch: Mapping[str, Any], tower: nn.Module, text: nn.Module) -> None:
    """Raises ValueError where DistributedDataParallel would wait for gradients of a tower that sees no image.

    Arguments:
        model: as it is wrapped.
        batch: as `in_step` gives it: without images no replica has any.
        tower, text: the module that computes features of images, and the decoder, which may be inside of it.
    """
    waits = isinstance(model, DistributedDataParallel) and model.training and not model.find_unused_parameters
    if not waits or batch.get(STAND_IN) is not None or any(medium.given(batch) for medium in MEDIA):
        return
    decoder = set(text.parameters())
    if any(x.requires_grad for x in tower.parameters() if x not in decoder):
        raise ValueError(
            "ddp_find_unused_parameters=False, and a micro-batch has no image on any replica: gradients would not be "
            "averaged, since those of the vision tower are waited for. Leave it out, freeze the tower, or give images "
            "in every micro-batch"
        )


def _reason(name: str) -> str:
    return next((reason for names, reason in KINDS if re.search(names, name)), OTHER)
