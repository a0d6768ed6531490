"""Values that look like secrets: the one place that knows how they look, and what stands in their place.

What a run writes and says about its configuration, and about what went wrong, goes through `redacted`.
"""

import re
from typing import Any

HIDDEN = "<redacted>"
WORDS = {"token", "secret", "secrets", "password", "passwd", "passphrase", "apikey", "credential", "credentials"}
PAIRS = ("api_key", "access_key", "private_key", "secret_key", "account_key")
# Words beside which a token is one of a text.
OF_TEXT = {"bos", "eos", "pad", "unk", "sep", "cls", "mask", "image", "video", "audio", "start", "end", "boi", "eoi"}
_VALUES = (
    re.compile(r"\bhf_[A-Za-z0-9]{16,}\b"),  # Hugging Face
    re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b"),  # AWS
    re.compile(r"\b(gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,})"),  # GitHub
    re.compile(r"\bsk-[A-Za-z0-9_\-]{20,}"),  # OpenAI and others
    re.compile(r"\bxox[abprs]-[A-Za-z0-9\-]{10,}"),  # Slack
    re.compile(r"\beyJ[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]+"),  # JSON web tokens
    re.compile(r"(?<=\bbearer )[A-Za-z0-9._~+/\-]{8,}=*", re.IGNORECASE),
    re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"),  # user and password in an address
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|$)", re.DOTALL),
)
# In a text: `password=...` or `"api_key": "..."`, as commands and messages have them.
_NAMED = re.compile(r"""(?P<key>[\w.\-]+)(?P<is>['"]?\s*[=:]\s*['"]?)(?P<value>[^\s'",;}{\]]{4,})""")


def redacted(value: Any, key: str = "") -> Any:
    """The same value, nested as it is, with `<redacted>` for every text in it that looks like a secret.

    Arguments:
        key: under which the value stands. Numbers, switches and null are never secrets.
    """
    if isinstance(value, dict):
        return {name: redacted(one, str(name)) for name, one in value.items()}
    if isinstance(value, list):
        return [redacted(one, key) for one in value]
    if isinstance(value, tuple):
        return tuple(redacted(one, key) for one in value)
    if not isinstance(value, str) or not value:
        return value
    if is_secret(key):
        return HIDDEN
    for pattern in _VALUES:
        value = pattern.sub(HIDDEN, value)
    return _without_named(value)


def is_secret(key: str) -> bool:
    """Whether a key is that of a secret by its last name: `hf_token`, but neither `eos_token` nor `tokenizer`."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key.rpartition(".")[2]).lower().replace("-", "_")
    words = set(name.split("_"))
    return bool(words & WORDS or any(pair in name for pair in PAIRS)) and not words & OF_TEXT


def _without_named(text: str) -> str:
    """A value that is none may begin with a key itself, as in `unknown key: token=...`."""
    place = 0
    while found := _NAMED.search(text, place):
        if is_secret(found["key"]):
            text = text[: found.start("value")] + HIDDEN + text[found.end() :]
            place = found.start("value") + len(HIDDEN)
        else:
            place = found.start("value")
    return text
