"""Loss masks of conversations: those of TRL, token by token, and a refusal where turns cannot be found."""

import json
from datetime import datetime

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("trl")

from omegaconf import OmegaConf

from ringattn.training.data.chat import ChatEncoder, template_of, turns_of
from ringattn.training.data.encoding import Encoding
from ringattn.training.data.loading import Loader
from ringattn.training.data.sources import sources_of
from tests.training.chat_tokenizers import PREFIX_OF_THINKING, SPECIAL, TALK, chat_tokenizer, trl_template

NAMES = sorted(SPECIAL)
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}


def by_trl(tokenizer, turns) -> tuple[list[int], list[int]]:
    """Ids and labels that TRL's SFTTrainer makes of a conversation with `assistant_only_loss`."""
    from trl.chat_template_utils import get_training_chat_template

    template = get_training_chat_template(tokenizer)
    out = tokenizer.apply_chat_template(
        turns, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    return out["input_ids"], out["assistant_masks"]


def learned(tokenizer, ids, mask) -> list[str]:
    """The texts of the runs of learned tokens."""
    runs, before = [], False
    for token, on in zip(ids, mask, strict=True):
        if on:
            runs = [*runs, []] if not before else runs
            runs[-1].append(int(token))
        before = bool(on)
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("name", NAMES)
def test_marks_of_a_template_are_those_that_trl_takes(name):
    tokenizer = chat_tokenizer(name)
    ids, mask = ChatEncoder(tokenizer, template_of(tokenizer, "trl"), "assistant")(TALK)
    expected_ids, expected_mask = by_trl(tokenizer, TALK)
    assert ids.tolist() == expected_ids
    assert mask.astype(int).tolist() == expected_mask
    assert 0 < mask.sum() < len(ids)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("turns", [TALK[:2], TALK, [*TALK, TALK[0]]], ids=("one answer", "two", "a question last"))
def test_without_marks_the_same_turns_are_found(name, turns):
    """The original templates have no marks. Qwen's own leaves the empty thoughts of earlier answers out, and TRL's
    variant keeps them: there the texts differ, and what is learned is the same but for these."""
    tokenizer = chat_tokenizer(name)
    ids, mask = ChatEncoder(tokenizer, None, "assistant")(turns)
    assert ids.tolist() == tokenizer.apply_chat_template(turns, return_dict=False)
    expected_ids, expected_mask = by_trl(tokenizer, turns)
    found, expected = learned(tokenizer, ids, mask), learned(tokenizer, expected_ids, expected_mask)
    if name == "qwen3":
        found, expected = ([one.removeprefix(PREFIX_OF_THINKING) for one in runs] for runs in (found, expected))
    else:
        assert mask.astype(int).tolist() == expected_mask
    assert found == expected
    assert len(found) == sum(turn["role"] == "assistant" for turn in turns)


def test_words_that_close_a_turn_may_stand_in_it():
    tokenizer = chat_tokenizer("qwen3")
    talk = [TALK[0], {"role": "assistant", "content": "so <|im_end|>\n it ends"}, *TALK[2:]]
    ids, mask = ChatEncoder(tokenizer, None, "assistant")(talk)
    assert learned(tokenizer, ids, mask)[0] == "so <|im_end|>\n it ends<|im_end|>\n"


def test_calls_of_tools_are_learned_and_their_results_are_not():
    tokenizer = chat_tokenizer("qwen3")
    talk = [TALK[0], CALL, {"role": "tool", "content": "5"}, TALK[1], TALK[2]]
    ids, mask = ChatEncoder(tokenizer, template_of(tokenizer, "trl"), "assistant")(talk)
    assert mask.astype(int).tolist() == by_trl(tokenizer, talk)[1]
    found = learned(tokenizer, ids, mask)
    assert '"name": "add"' in found[0]
    assert not any("tool_response" in one for one in found)


def test_calls_of_tools_are_found_without_marks():
    """Qwen's own template leaves the empty thoughts of a call out once its result follows."""
    tokenizer = chat_tokenizer("qwen3")
    talk = [TALK[0], CALL, {"role": "tool", "content": "5"}, CALL, {"role": "tool", "content": "7"}, TALK[1]]
    ids, mask = ChatEncoder(tokenizer, None, "assistant")(talk)
    found = learned(tokenizer, ids, mask)
    assert len(found) == 3
    assert all(one.startswith("<tool_call>") and one.endswith("</tool_call><|im_end|>\n") for one in found[:2])
    assert found[2].endswith("It is 5.  \n<|im_end|>\n")


@pytest.mark.parametrize("name", NAMES)
def test_texts_in_parts_are_one_text(name):
    """Most templates take a text alone, and leave a list out without a word."""
    parts = [turn | {"content": [{"type": "text", "text": turn["content"], "image": None}]} for turn in TALK]
    encode = ChatEncoder(chat_tokenizer(name), None, "assistant")
    for found, expected in zip(encode(parts), encode(TALK), strict=True):
        assert found.tolist() == expected.tolist()


def test_a_template_that_takes_parts_alone_gets_them():
    encode = ChatEncoder(chat_tokenizer("llama3", trl_template("smolvlm_training")), None, "assistant")
    ids, mask = encode([turn | {"content": turn["content"].strip()} for turn in TALK])
    assert learned(encode.tokenizer, ids, mask) == [
        " It is 5.<end_of_utterance>\n",
        " It is 9, and 9 is odd.<end_of_utterance>\n",
    ]


@pytest.mark.parametrize(
    ("name", "loss_on"), [("llama3_2", "assistant"), ("gptoss_training", "assistant"), ("gptoss", "all")]
)
def test_a_template_that_states_the_date_gives_the_same_tokens_every_day(name, loss_on, monkeypatch):
    from transformers.utils import chat_template_utils

    def on(year: int) -> list[int]:
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(year, 5, 6)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        return ChatEncoder(tokenizer, None, loss_on)(TALK)[0].tolist()

    tokenizer = chat_tokenizer("llama3", trl_template(name))
    assert on(2001) == on(2002)
    assert "Jul 2024" in tokenizer.decode(on(2001)) or "2024-07-26" in tokenizer.decode(on(2001))


def test_everything_is_learned_if_asked():
    tokenizer = chat_tokenizer("gemma")
    ids, mask = ChatEncoder(tokenizer, None, "all")(TALK)
    assert mask is None
    assert ids.tolist() == tokenizer.apply_chat_template(TALK, return_dict=False)


def test_the_assistant_may_speak_first():
    tokenizer = chat_tokenizer("llama3")
    ids, mask = ChatEncoder(tokenizer, None, "assistant")(TALK[1:])
    expected_ids, expected_mask = by_trl(tokenizer, TALK[1:])
    assert (ids.tolist(), mask.astype(int).tolist()) == (expected_ids, expected_mask)


def test_turns_of_other_names_are_understood():
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert turns_of(talk) == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("text", "list of turns"),
        ([], "list of turns"),
        (["a"], "turn 1 .* must be an object"),
        ([{"role": "user"}], r"turn 1 .* needs a role and a content, it has \['role'\]"),
        ([TALK[0]], "no turn of the assistant"),
        ([TALK[0] | {"content": [{"type": "image", "url": "a.png"}]}], "turn 1 .* has a part of type 'image'"),
        ([TALK[0] | {"content": ["a"]}], "turn 1 .* has a part that is no object"),
        ([TALK[0], TALK[1] | {"weight": 0}], "turn 2 .* has weight=0, and all turns of the assistant are learned"),
        ([TALK[0], TALK[1] | {"train": False}], "turn 2 .* has train=False"),
        ('[{"messages": []}]', "must be a list of turns, got text"),
        ([{"role": "system", "content": "s"}, *TALK], "the chat template refuses .*System role not supported"),
    ],
)
def test_what_is_no_conversation_is_refused(value, words):
    with pytest.raises(ValueError, match=words):
        ChatEncoder(chat_tokenizer("gemma"), None, "assistant")(value)


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_a_turn_that_a_template_leaves_out_is_no_silent_loss(loss_on):
    """Qwen's passes over roles that it does not know."""
    encode = ChatEncoder(chat_tokenizer("qwen3"), None, loss_on)
    told = {"role": "developer", "content": "Be kind."}
    with pytest.raises(ValueError, match="turn 1, of role 'developer', is not in the rendered conversation"):
        encode([told, *TALK])
    tool = {"role": "tool", "content": '{"is": "5"}'}
    ids, _ = encode([{"role": "system", "content": "  Be kind. "}, TALK[0], CALL, tool, TALK[1]])
    assert "Be kind." in encode.tokenizer.decode(ids)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
AS_TEXT = {"name": "add", "arguments": '{"a": 2}'}
LEFT_OUT: dict[str, tuple[str, list, list | None, str]] = {
    "calls": ("llama3", [TALK[0], CALL, TALK[0], TALK[1]], None, "turn 2 calls 'add', not in the rendered"),
    "tools": ("gemma", TALK, [TOOL], "has tools, not in its rendered text"),
    "thoughts": ("llama3", [TALK[0], TALK[1] | {"reasoning_content": "Hm."}], None, "turn 2, .* has reasoning_content"),
    "words beside a call": ("llama3_1", [TALK[0], CALL | {"content": "I add."}], [TOOL], "turn 2, of role 'assistant'"),
    "arguments": (
        "qwen2_5",
        [TALK[0], {"role": "assistant", "tool_calls": [{"type": "function", "function": AS_TEXT}]}],
        [TOOL],
        "turn 2 calls 'add' with arguments as text, and the chat template writes them in quotes",
    ),
}


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
@pytest.mark.parametrize("what", LEFT_OUT)
def test_what_a_template_leaves_out_of_a_turn_is_refused(what, loss_on):
    """Without calls an assistant would learn to answer nothing, and without tools to call what it never saw."""
    template, talk, tools, words = LEFT_OUT[what]
    encode = ChatEncoder(chat_tokenizer("qwen3", trl_template(template)), None, loss_on)
    with pytest.raises(ValueError, match=words):
        encode(talk, tools)


@pytest.mark.parametrize(
    "said", ["5.", "It is 5, since 2 and 3 are 5, and 5 is what there is, as was to be shown here."]
)
def test_thoughts_that_are_left_out_later_are_no_fault(said):
    """Qwen 3's template shows them in the last answer, however short that is."""
    thoughtful = {"role": "assistant", "content": f"<think>\nHm.\n</think>\n\n{said}"}
    encode = ChatEncoder(chat_tokenizer("qwen3"), None, "assistant")
    ids, mask = encode([TALK[0], thoughtful, TALK[2], TALK[3] | {"reasoning_content": "So."}])
    assert learned(encode.tokenizer, ids, mask) == [
        f"{said}<|im_end|>\n",
        "<think>\nSo.\n</think>\n\nIt is 9, and 9 is odd.<|im_end|>\n",
    ]


@pytest.mark.parametrize(
    ("key", "value"), [("system", "Be kind."), ("chat_template_kwargs", {"enable_thinking": False})]
)
def test_keys_that_other_programs_take_in_are_not_left_out(key, value, tmp_path):
    chat_tokenizer("qwen3").save_pretrained(tmp_path)
    encode = Encoding("chat", "messages", tokenizer=str(tmp_path)).build()
    with pytest.raises(ValueError, match=f"the record has {key!r} beside 'messages'"):
        encode({"messages": TALK, key: value})
    for nothing in (None, "", {}):
        encode({"messages": TALK, key: nothing})
    if key == "system":
        encode({"messages": [{"role": "system", "content": value}, *TALK], key: value})


def test_a_conversation_is_known_by_the_special_tokens_of_its_tokenizer(tmp_path):
    """Templates write them by their names: the same tokens in another role are another text."""
    found = []
    for name, first in (("a", "<|endoftext|>"), ("b", "<|im_start|>")):
        tokenizer = chat_tokenizer("qwen3", "{{ bos_token }}" + trl_template("qwen3"))
        tokenizer.bos_token = first
        tokenizer.save_pretrained(tmp_path / name)
        source = {"path": str(tmp_path / "a.jsonl"), "kind": "chat"}
        (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TALK}) + "\n")
        data = {"cache": str(tmp_path / "cache"), "processes": 1, "tokenizer": str(tmp_path / name)}
        corpus = Loader(OmegaConf.create(data), (), lambda tokens: None).mixture(sources_of([source]))
        found.append(tokenizer.decode(corpus.read(0, 0, 1)))
    assert found == ["<|endoftext|>", "<|im_start|>"]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content }}{% endfor %}",  # no prompt to answer
        "{{ messages|length }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}",  # every rendering begins otherwise
    ],
)
def test_a_template_that_hides_its_turns_is_refused(template):
    with pytest.raises(ValueError, match=r"turn 2, .* cannot be found .*data\.chat_template"):
        ChatEncoder(chat_tokenizer("gemma", template), None, "assistant")(TALK)


def test_a_tokenizer_without_a_template_is_refused(tmp_path):
    tokenizer = chat_tokenizer("gemma")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"no chat template; .*data\.chat_template"):
        ChatEncoder(tokenizer, None, "assistant")
    (tmp_path / "own.jinja").write_text(trl_template("gemma_training"))
    template = template_of(tokenizer, str(tmp_path / "own.jinja"))
    assert ChatEncoder(tokenizer, template, "assistant").marked
    with pytest.raises(ValueError, match=r"data\.chat_template=.*no\.jinja"):
        template_of(tokenizer, str(tmp_path / "no.jinja"))
    with pytest.raises(ValueError, match=r"data\.chat_template=trl: "):
        template_of(chat_tokenizer("gemma", "{{ messages }}"), "trl")


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_a_broken_template_is_no_fault_of_a_conversation(loss_on):
    broken = "{% for m in messages %}\n{{ m.content }"
    with pytest.raises(ValueError, match=r"the chat template is broken, line 2: .*data\.chat_template"):
        ChatEncoder(chat_tokenizer("gemma"), broken, loss_on)


def test_a_template_that_marks_nothing_is_told():
    marked = "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}"
    with pytest.raises(ValueError, match="the chat template marks none"):
        ChatEncoder(chat_tokenizer("gemma", marked), None, "assistant")(TALK)


def test_a_mask_covers_tokens_that_touch_a_span():
    from ringattn.training.data.chat import overlapping

    offsets = [(0, 2), (2, 4), (4, 4), (4, 6), (6, 9)]
    assert np.array_equal(overlapping(offsets, [(1, 2), (5, 7)]), [True, False, False, True, True])
