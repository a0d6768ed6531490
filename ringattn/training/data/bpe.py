"""A tokenizer of one's own: byte-level BPE, trained by the `tokenizers` library and saved as transformers loads it."""

from collections.abc import Iterable
from pathlib import Path

from ringattn.training.data.tokenizer import BYTE_VOCABULARY

END = "<|end|>"
LEAST = BYTE_VOCABULARY + 1
"""Tokens that every byte and the end of a document take."""


def train_bpe(texts: Iterable[str], folder: Path, vocabulary: int) -> int:
    """Trains a byte-level BPE (that of GPT-2) on texts and saves it in a folder; the number of its tokens.

    Arguments:
        texts: are gone through once.
        folder: is made where it does not exist; its tokenizer is replaced.
        vocabulary: tokens at most. There are fewer where nothing is left to be joined.

    Every text can be tokenized, since every byte is a token. The end of a document is the token `<|end|>`.
    Raises ValueError for a vocabulary without room for these.
    """
    if vocabulary < LEAST:
        raise ValueError(f"vocabulary must be at least {LEAST}, a token for each byte and the end, got {vocabulary}")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # in an order of its own: the same ids each time
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=alphabet,
        special_tokens=[AddedToken(END, special=True)],
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=model, eos_token=END).save_pretrained(folder)
    return int(model.get_vocab_size())
