"""Hugging Face models on a sequence mesh: `parallelize(model, mesh)`, then `model(**shard_batch(batch, docs, mesh))`.

The layout of a batch travels to every attention layer as the keyword `cu_seq_lens_q`, the one that transformers passes
on in all families and under both kinds of gradient checkpointing. It is the `Layout` itself: host integers that no
wrapper moves to a device, and the only truth about documents. Nothing is inferred from local positions or masks.

`model.py` changes a model and `handle.py` is what it leaves there. `support.py`, `configuration.py` and `adapters.py`
say which models can be exact, `changes.py` looks again before every forward pass, `local_draws.py` is about random
numbers, `masks.py` and `attention.py` are what transformers calls, `features.py` is what a layer may ask of them,
`recurrent.py` and `recurrent_functions.py` are about layers that carry a state, `metadata.py` reads documents from a
batch, `images.py`, `blocks.py` and `vision.py` are about images, `trees.py` is for trees of sequences,
`elementwise.py` compiles norms and the like, `trainer/` is for `transformers.Trainer`, `options/` knows its options,
`conformance.py` compares with documents run alone. Nothing here imports transformers before it is used.
"""

from ringattn.hf.batch import attention_kwargs, shard_batch
from ringattn.hf.handle import Handle
from ringattn.hf.loss import IGNORE_INDEX, shifted_labels
from ringattn.hf.model import parallelize
from ringattn.hf.support import check_model
from ringattn.hf.trees import sequence_logprobs, shard_trees

__all__ = [
    "IGNORE_INDEX",
    "Handle",
    "attention_kwargs",
    "check_model",
    "parallelize",
    "sequence_logprobs",
    "shard_batch",
    "shard_trees",
    "shifted_labels",
]
