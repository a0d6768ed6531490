"""Is what a conversation holds in the text that its chat template makes of it?

Templates pass over what they do not know, without an error: roles, calls of tools, tools, thoughts. A model would learn
answers to words that it never saw, or empty answers in the place of calls.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

Turns = list[dict[str, Any]]
Render = Callable[[Turns, Any], str]

PROBE = "QzXvJkWp"  # text that no template changes
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_MARKS = re.compile(r"</?think>")
_ADVICE = "take another template by data.chat_template, or"


def check_heard(turns: Turns, tools: Any, text: str, render: Render) -> None:
    """Raises ValueError for a turn, words, thoughts, calls or tools that the template passed over.

    What it shows of an answer that nothing follows, and leaves out later, as the thoughts of earlier answers, is left
    out as in use, and no fault.

    Arguments:
        text: of the whole conversation.
        render: the template, for turns and tools; it raises ValueError for what the template refuses.
    """
    for number, turn in enumerate(turns, 1):
        missing = _missing(turn, text)
        if missing and turn["role"] == "assistant":
            missing = _missing(turn, render(turns[:number], tools))
        if missing:
            what = "is" if missing == ["content"] else f"has {', '.join(missing)} that is"
            raise ValueError(
                f"turn {number}, of role {turn['role']!r}, {what} not in the rendered conversation: the chat template "
                "leaves it out; give it a role, or keys, that the template knows, or another template by "
                "data.chat_template"
            )
        _check_arguments(number, turn, text)
    _check_calls(turns, tools, render)
    _check_tools(turns, tools, render)


def _missing(turn: Mapping[str, Any], text: str) -> list[str]:
    """What of a turn is not in a text: its content, or the keys of its thoughts."""
    content = str(turn["content"])
    # Templates move the thoughts in an answer to where they want them.
    parts = _MARKS.split(content) if turn["role"] == "assistant" else [content]
    missing = [] if all(_is_in(part.strip(), text) for part in parts) else ["content"]
    thoughts = {key: turn[key].strip() for key in _THOUGHTS if isinstance(turn.get(key), str)}
    if any(thoughts.values()) and not any(thought and thought in text for thought in thoughts.values()):
        missing += [key for key, thought in thoughts.items() if thought]
    return missing


def _is_in(content: str, text: str) -> bool:
    # Results of tools are written as JSON by some.
    return content in text or any(json.dumps(content, ensure_ascii=ascii)[1:-1] in text for ascii in (False, True))


def _check_arguments(number: int, turn: Mapping[str, Any], text: str) -> None:
    for function in _functions(turn):
        given = function.get("arguments")
        if isinstance(given, str) and given not in text and json.dumps(given) in text:
            raise ValueError(
                f"turn {number} calls {function.get('name')!r} with arguments as text, and the chat template writes "
                f"them in quotes, {json.dumps(given)[:60]}: give an object instead"
            )


def _check_calls(turns: Turns, tools: Any, render: Render) -> None:
    """Other names of what is called must show."""
    calls = [(number, function) for number, turn in enumerate(turns, 1) for function in _functions(turn)]
    if not calls:
        return
    names = iter(range(len(calls)))
    changed = [turn | {"tool_calls": [_renamed(one, next(names)) for one in _calls(turn)]} if _calls(turn) else turn
               for turn in turns]  # fmt: skip
    try:
        text = render(changed, tools)
    except ValueError:  # it looks at names, and so at calls
        return
    for probe, (number, function) in enumerate(calls):
        if _probe(probe) not in text:
            raise ValueError(
                f"turn {number} calls {function.get('name')!r}, not in the rendered conversation: the chat template "
                f"leaves calls of tools out; {_ADVICE} write the call into the content"
            )


def _check_tools(turns: Turns, tools: Any, render: Render) -> None:
    if not isinstance(tools, list) or not all(isinstance(one, dict) for one in tools):
        return
    try:
        text = render(turns, [_renamed(one, number) for number, one in enumerate(tools)])
    except ValueError:
        return
    if any(_probe(number) not in text for number in range(len(tools))):
        raise ValueError(
            f"the conversation has tools, not in its rendered text: the chat template leaves them out; {_ADVICE} leave "
            "out the tools"
        )


def _calls(turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    calls = turn.get("tool_calls")
    return calls if isinstance(calls, list) and all(isinstance(one, dict) for one in calls) else []


def _functions(turn: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = [one.get("function", one) for one in _calls(turn)]
    return [one for one in found if isinstance(one, Mapping)]


def _renamed(call: dict[str, Any], number: int) -> dict[str, Any]:
    """A call, or a tool, with a name of its own."""
    if isinstance(inner := call.get("function"), dict):
        return call | {"function": inner | {"name": _probe(number)}}
    return call | {"name": _probe(number)}


def _probe(number: int) -> str:
    return f"{PROBE}{number}x"
