"""`transformers.Trainer` on a sequence mesh: batches go to replicas, every rank of a replica takes its part of them.

Four things differ from the stock Trainer: who gets which batch, how targets are counted, evaluation, which is the exact
mean over all targets of the data set, and figures that are added up over ranks. Needs accelerate, as the stock Trainer
does.

`on_mesh.py` is the class; `dealing.py` and `randomness.py` make equal batches on the ranks of a sequence,
`agreement.py` and `lockstep.py` see that they are, `refusals.py` and `ringattn/hf/options/` say what cannot be.
"""

from transformers import Trainer

from ringattn.hf.trainer.on_mesh import OnMesh

__all__ = ["OnMesh", "SequenceTrainer"]


class SequenceTrainer(OnMesh, Trainer):
    """`transformers.Trainer` on a sequence mesh, see `OnMesh`."""
