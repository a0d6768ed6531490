"""Conversations as tokens: the tokenizer's chat template, with a loss on what the assistant says or on everything.

A template that marks the assistant's turns with `{% generation %}` says by itself what is learned (transformers'
`return_assistant_tokens_mask`). For others the turns are found by rendering the conversation with and without them:
what follows the prompt to answer, up to and with the end of the turn. A conversation in which they cannot be found so
is refused, never guessed at.
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ringattn.training.data.chat_heard import PROBE, Turns, check_heard

LOSS_ON = ("assistant", "all")
OF_TRL = "trl"
_ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant"}
_UNLEARNED = ("weight", "train", "training", "loss")
"""Keys by which other programs leave a turn out of the loss: OpenAI's fine-tuning, axolotl, ms-swift."""
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")

# What date directives stand for on 26 July 2024.
_DAY = [
    *(("d", "26"), ("b", "Jul"), ("B", "July"), ("m", "07"), ("Y", "2024"), ("y", "24"), ("F", "2024-07-26")),
    *(("A", "Friday"), ("a", "Fri"), ("j", "208"), ("H", "00"), ("M", "00"), ("S", "00")),
]

Spans = list[tuple[int, int]]


class ChatEncoder:
    """From a conversation to its ids, and which of them are learned.

    Arguments:
        tokenizer: of transformers, a fast one where turns have to be found.
        template: text of a chat template in the place of the tokenizer's own.
        loss_on: `assistant`, or `all`.

    Raises ValueError for a tokenizer without a template or with one that is no Jinja, or one that cannot say where its
    tokens stand in the text.
    """

    def __init__(self, tokenizer: Any, template: str | None, loss_on: str) -> None:
        own = template or tokenizer.chat_template
        self.template: str | None = own.get("default") if isinstance(own, dict) else own
        if not self.template:
            raise ValueError("the tokenizer has no chat template; name a file with one by data.chat_template")
        self.template = _dated(self.template)
        _check_syntax(tokenizer, self.template)
        self.tokenizer, self.loss_on, self.in_parts = tokenizer, loss_on, False
        self.in_parts = self._needs_parts()
        self.marked = _MARKED.search(self.template) is not None
        if loss_on == "assistant" and not tokenizer.is_fast:
            raise ValueError("data.loss_on=assistant needs a fast tokenizer, one that knows where its tokens stand")

    def __call__(self, value: Any, tools: Any = None) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
        """Ids (n,) int64 and what is learned (n,) bool, None for everything.

        Raises ValueError for what is no conversation, and for one in which the assistant says nothing.
        """
        turns, tools = turns_of(value), _tools(tools)
        text = self._render(turns, tools)
        check_heard(turns, tools, text, self._render)
        if self.loss_on == "all":
            return np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int64), None
        if not any(turn["role"] == "assistant" for turn in turns):
            roles = ", ".join(dict.fromkeys(turn["role"] for turn in turns))
            raise ValueError(
                f"the conversation has no turn of the assistant, and so nothing to learn; its roles are {roles}"
            )
        _check_weights(turns)
        ids, mask = self._marked(turns, tools) if self.marked else self._found(text, turns, tools)
        if not mask.any():
            raise ValueError("no token of the conversation is learned: the chat template marks none")
        return ids, mask

    def _marked(self, turns: Turns, tools: Any) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """By the template's own marks."""
        try:
            out = self.tokenizer.apply_chat_template(
                self._as_taken(turns),
                tools=tools,
                chat_template=self.template,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        except Exception as error:  # of jinja, or raised in a template
            raise _refused(error) from None
        return np.asarray(out["input_ids"], np.int64), np.asarray(out["assistant_masks"], bool)

    def _found(self, text: str, turns: Turns, tools: Any) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """By rendering with and without each turn. Takes the square of the number of turns."""
        spans = [
            self._span(text, turns, number, tools) for number, turn in enumerate(turns) if turn["role"] == "assistant"
        ]
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return np.asarray(out["input_ids"], np.int64), overlapping(out["offset_mapping"], spans)

    def _span(self, text: str, turns: Turns, number: int, tools: Any) -> tuple[int, int]:
        """Characters of a turn: from the end of the prompt to answer to the end of the turn."""
        with_turn = self._render(turns[: number + 1], tools)
        start = self._start(with_turn, turns, number, tools)
        if start is None or not text.startswith(with_turn[:start]):
            raise _unfound(number)
        if text.startswith(with_turn):
            return start, len(with_turn)
        # The template renders a turn otherwise once others follow, as Qwen 3 does with thoughts: then its end is where
        # the text that closes a turn stands behind the last words of the content.
        changed = [*turns[:number], turns[number] | {"content": PROBE}]
        _, found, close = self._render(changed, tools).rpartition(PROBE)
        # Of an answer without its thoughts, which may be what is left out.
        content = turns[number]["content"].rpartition("</think>")[2].rstrip()
        close = close if content else close.lstrip()  # a call of a tool stands on a line of its own behind words alone
        at = text.find(close, start) if found and close else -1
        while at >= 0:
            if text[start:at].rstrip().endswith(content[-64:].lstrip()):
                return start, at + len(close)
            at = text.find(close, at + 1)
        raise _unfound(number)

    def _start(self, with_turn: str, turns: Turns, number: int, tools: Any) -> int | None:
        """Where the answer begins in the text that ends with its turn; None if the template does not say."""
        if number:
            prompt = self._render(turns[:number], tools, prompt=True)
            plain = self._render(turns[:number], tools)
            return len(prompt) if prompt != plain and with_turn.startswith(prompt) else None
        asked = [{"role": "user", "content": PROBE}]
        prompt = self._render(asked, tools, prompt=True).removeprefix(self._render(asked, tools))
        at = with_turn.find(prompt)
        return at + len(prompt) if prompt and at >= 0 else None

    def _needs_parts(self) -> bool:
        """Whether the template takes a text as a list of parts alone, as those of models that see pictures do."""
        asked = [{"role": "user", "content": PROBE}]
        for self.in_parts in (False, True):
            with suppress(ValueError):
                if PROBE in self._render(asked, None):
                    return self.in_parts
        return False

    def _as_taken(self, turns: Turns) -> Turns:
        if not self.in_parts:
            return turns
        return [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]

    def _render(self, turns: Turns, tools: Any, prompt: bool = False) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                self._as_taken(turns),
                tools=tools,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        except Exception as error:  # of jinja, or raised in a template
            raise _refused(error) from None
        return text


def overlapping(offsets: Sequence[tuple[int, int]], spans: Spans) -> npt.NDArray[np.bool_]:
    """(n,) bool: which tokens, at `[start, stop)` of a text, have a character in a span; spans are in order."""
    mask, at = np.zeros(len(offsets), bool), 0
    for number, (start, stop) in enumerate(offsets):
        while at < len(spans) and start >= spans[at][1]:
            at += 1
        mask[number] = at < len(spans) and start < stop and stop > spans[at][0]
    return mask


def turns_of(value: Any) -> Turns:
    """A conversation as a list of turns with `role` and `content`; `from` and `value`, as ShareGPT has them, are taken.

    Raises ValueError for anything else.
    """
    if isinstance(value, str):
        raise ValueError(
            f"a conversation must be a list of turns, got text, {value[:60]!r}; conversations are the lines of .jsonl "
            "files or the rows of tables"
        )
    if not isinstance(value, Sequence) or not value:
        raise ValueError(f"a conversation must be a list of turns, got {str(value)[:80]!r}")
    turns = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, Mapping):
            raise ValueError(f"turn {number} of the conversation must be an object, got {str(turn)[:80]!r}")
        plain = {key: one for key, one in turn.items() if one is not None}  # tables fill what is absent with null
        if "role" not in plain and "from" in plain:
            role = str(plain.pop("from"))
            plain |= {"role": _ROLES.get(role, role), "content": plain.pop("value", None)}
        content = plain.get("content")
        if not isinstance(plain.get("role"), str) or not (
            isinstance(content, str | list) or (content is None and plain.get("tool_calls"))
        ):
            raise ValueError(f"turn {number} of the conversation needs a role and a content, it has {sorted(turn)}")
        turns.append(plain | {"content": _joined(content, number)})
    return turns


def _joined(content: Any, number: int) -> str:
    """The content of a turn as one text: templates of text models leave a list of parts out, without an error."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content:
        if not isinstance(part, Mapping):
            raise ValueError(f"turn {number} of the conversation has a part that is no object: {str(part)[:80]!r}")
        if not isinstance(text := part.get("text"), str) or part.get("type", "text") != "text":
            raise ValueError(f"turn {number} of the conversation has a part of type {part.get('type')!r}, not text")
        texts.append(text)
    return "".join(texts)


def _check_weights(turns: Turns) -> None:
    for number, turn in enumerate(turns, 1):
        for key in _UNLEARNED if turn["role"] == "assistant" else ():
            if turn.get(key, 1) != 1:
                raise ValueError(
                    f"turn {number} of the conversation has {key}={turn[key]!r}, and all turns of the assistant are "
                    "learned alike: leave the key out, or the turn and what follows"
                )


def template_of(tokenizer: Any, given: str | None) -> str | None:
    """The text of `data.chat_template`: null for the tokenizer's own, a file, or `trl` for TRL's training variant.

    Raises ValueError for a file that cannot be read, and for a template that TRL has no variant of.
    """
    if given is None:
        return None
    if given == OF_TRL:
        try:
            from trl.chat_template_utils import get_training_chat_template
        except ImportError:
            raise ValueError("data.chat_template=trl needs the package: pip install trl") from None
        try:
            found: str | None = get_training_chat_template(tokenizer)
            return found
        except Exception as error:
            raise ValueError(f"data.chat_template=trl: {str(error).partition(chr(10))[0]}") from None
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"data.chat_template={given!r} must be a file with a template, or trl: {error}") from None


def _check_syntax(tokenizer: Any, template: str) -> None:
    """A template that is broken would refuse every conversation, as if each were at fault. Raises ValueError."""
    from jinja2 import TemplateSyntaxError

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": PROBE}], chat_template=template, tokenize=False)
    except TemplateSyntaxError as error:
        raise ValueError(
            f"the chat template is broken, line {error.lineno}: {error.message}; data.chat_template names another"
        ) from None
    except Exception:  # what it says of a conversation is heard when there is one
        return


def _dated(template: str) -> str:
    """A template that asks for today's date, answered with one of all days: the one that Llama's names where it gets
    none. Otherwise a conversation would have other tokens tomorrow, and a run that goes on other packs."""
    if "strftime_now" not in template:
        return template
    day = "".join(f"|replace('%{letter}', '{text}')" for letter, text in _DAY)
    return "{%- macro strftime_now(format) -%}{{ format" + day + " }}{%- endmacro -%}" + template


def _tools(tools: Any) -> Any:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"tools are not JSON: {error}") from None
    return tools or None


def _refused(error: Exception) -> ValueError:
    return ValueError(f"the chat template refuses the conversation: {str(error).partition(chr(10))[0]}")


def _unfound(number: int) -> ValueError:
    return ValueError(
        f"turn {number + 1}, the assistant's, cannot be found in the rendered conversation, and the chat template has "
        "no {% generation %} that marks it; data.chat_template=trl takes one that has, where TRL knows the model, or "
        "name a file; or learn everything with data.loss_on=all"
    )
