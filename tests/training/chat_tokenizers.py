"""Small tokenizers with the special tokens and chat templates of Llama 3, Qwen 3 and Gemma, made without a network."""

from pathlib import Path
from typing import Any

SPECIAL = {
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    "qwen3": ("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<think>", "</think>"),
    "gemma": ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
}
PREFIX_OF_THINKING = "<think>\n\n</think>\n\n"
TALK = [
    {"role": "user", "content": "What is the sum of 2 and 3?"},
    {"role": "assistant", "content": "It is 5.  \n"},
    {"role": "user", "content": " And with 4 more? It is odd."},
    {"role": "assistant", "content": "It is 9, and 9 is odd."},
]


def trl_template(name: str) -> str:
    """A template as TRL ships it; `name` may end in `_training`."""
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def chat_tokenizer(name: str, template: str | None = None) -> Any:
    """A byte-level BPE of a few merges, with a model's special tokens and its template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=sorted(alphabet), show_progress=False)
    model.train_from_iterator([str(turn["content"]) for turn in TALK] * 4, trainer)
    first, end, *rest = SPECIAL[name]
    model.add_special_tokens([AddedToken(token, special=True) for token in (first, end, *rest)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token=first, eos_token=end)
    tokenizer.chat_template = trl_template(name) if template is None else template
    return tokenizer
