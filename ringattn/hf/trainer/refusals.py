"""Trainer classes that cannot be put on a mesh, refused by name with what to do instead."""

import re

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


def _reason(name: str) -> str:
    return next((reason for names, reason in KINDS if re.search(names, name)), OTHER)
