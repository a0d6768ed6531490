"""What looks like a secret is not written, and what only sounds like one is."""

import pytest

from ringattn.training.secrets import HIDDEN, is_secret, redacted

HF = "hf_" + "aB3" * 10
AWS = "AKIA" + "ABCDEFGHIJKLMNOP"


@pytest.mark.parametrize(
    "key", ["model.config.hf_token", "token", "API_KEY", "my-secret", "dbPassword", "aws_access_key_id", "apikey"]
)
def test_keys_of_secrets(key):
    assert is_secret(key)
    assert redacted({key: "anything"}) == {key: HIDDEN}
    assert redacted(f"unknown key: {key}=anything else") == f"unknown key: {key}={HIDDEN} else"


@pytest.mark.parametrize("key", ["data.tokenizer", "model.config.eos_token", "tokens", "keys", "pad_token_id", "lr"])
def test_keys_that_only_sound_so(key):
    assert not is_secret(key)
    assert redacted({key: "anything"}) == {key: "anything"}


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"data at {HF}, it says", f"data at {HIDDEN}, it says"),
        (f"{AWS}", HIDDEN),
        ("Authorization: Bearer abcdef0123456789==", f"Authorization: Bearer {HIDDEN}"),
        ("https://me:geheim@host/x", f"https://{HIDDEN}@host/x"),
        ('{"api_key": "abcdefgh", "lr": "0.0001"}', f'{{"api_key": "{HIDDEN}", "lr": "0.0001"}}'),
        ("optim.lr=0.0001 is 12 tokens: more than 8", "optim.lr=0.0001 is 12 tokens: more than 8"),
        ("/data/hf_models/books", "/data/hf_models/books"),
    ],
)
def test_values(text, left):
    assert redacted(text) == left


def test_nested_values_keep_their_kinds():
    assert redacted({"a": [1, None, {"password": "x", "n": 3}], "b": (True, HF)}) == {
        "a": [1, None, {"password": HIDDEN, "n": 3}],
        "b": (True, HIDDEN),
    }
