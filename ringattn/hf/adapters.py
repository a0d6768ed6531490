"""Which adapters of PEFT a parallelized model may carry. Refusals, tests and the table of docs/peft.md read this list.

An adapter is exact if it treats each token alone, so that a rank's tokens get what they would get in one process, and
if its parameters' gradients are sums over tokens, so that those of the ranks add up. The ranks of a sequence draw
random numbers apart (see `ringattn.hf.local_draws`): right for a mask over tokens, wrong for one over weights.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

# Types that a test compares with each document run alone: loss, and gradients of all that is trained.
EXACT = frozenset(
    {
        "ADALORA",
        "ADAMSS",
        "ADAPTION_PROMPT",
        "BEFT",
        "BOFT",
        "C3A",
        "DEFT",
        "DELORA",
        "FOURIERFT",
        "FROD",
        "GLORA",
        "GRALORA",
        "HIRA",
        "HRA",
        "IA3",
        "LN_TUNING",
        "LOHA",
        "LOKR",
        "LORA",
        "MISS",
        "OFT",
        "OSF",
        "PEANUT",
        "PSOFT",
        "PVERA",
        "RANDLORA",
        "ROAD",
        "SHIRA",
        "SUPERTUNING",
        "TINYLORA",
        "TRAINABLE_TOKENS",
        "UNILORA",
        "VBLORA",
        "VERA",
        "WAVEFT",
    }
)
_VIRTUAL = "virtual tokens before the sequence would stand before every rank's part of it"
_PREFIX = "a prefix of keys and values, as of a KV cache, has no place in the documents"
REFUSED = {
    "CARTRIDGE": _PREFIX,
    "CPT": f"{_VIRTUAL}, and its loss is computed from a rank's tokens alone",
    "LILY": "its experts are mixed by an average over all tokens of the batch, of which a rank sees a part",
    "MULTITASK_PROMPT_TUNING": _VIRTUAL,
    "POLY": "its experts are mixed by a random draw for each row of a batch, which must be equal on all ranks, and the "
    "documents of a packed row have no task of their own",
    "PREFIX_TUNING": _PREFIX,
    "PROMPT_TUNING": _VIRTUAL,
    "P_TUNING": _VIRTUAL,
    "SHADOW": "its second model attends to a rank's tokens alone",
    "XLORA": "it runs the model twice in a forward pass, of which one run cannot be checked",
}
_WEIGHTS = (
    "its mask is drawn for weights, not for tokens, and must be equal on all ranks, which draw apart; set it to 0"
)


@dataclass(frozen=True)
class Rule:
    """An option of an adapter's configuration of which some values are refused.

    Arguments:
        types: the types that have it.
        exact: whether a value of it is exact.
    """

    option: str
    types: tuple[str, ...]
    exact: Callable[[Any], bool]
    reason: str


def _absent(value: Any) -> bool:
    return not value


def _random_projection(config: Any) -> bool:
    kind = config.get("init_type") if isinstance(config, dict) else getattr(config, "init_type", None)
    return config is None or kind == "random"


_LORA = ("LORA", "ADALORA")
RULES = (
    Rule("alora_invocation_tokens", _LORA, _absent, "the tokens that switch it on are looked for in a rank's ids"),
    Rule(
        "velora_config",
        _LORA,
        _random_projection,
        "its projection is an average over a rank's tokens; init_type='random' is exact",
    ),
    Rule(
        "monteclora_config",
        _LORA,
        _absent,
        "its noise is drawn for weights, not for tokens, and must be equal on all ranks, which draw apart",
    ),
    Rule(
        "layer_replication",
        _LORA,
        _absent,
        "the copied layers keep a configuration of their own, which another attention does not reach",
    ),
    Rule("boft_dropout", ("BOFT",), _absent, _WEIGHTS),
    Rule("module_dropout", ("LOHA", "LOKR", "OFT"), _absent, _WEIGHTS),
    Rule("rank_dropout", ("LOHA", "LOKR"), _absent, _WEIGHTS),
    Rule(
        "generator_seed",
        ("PVERA",),
        lambda seed: seed is None,
        "a generator of its own draws the same noise on every rank, for other tokens; set it to None",
    ),
    Rule(
        "sample_at_inference",
        ("PVERA",),
        _absent,
        "outside of training the ranks draw the same noise, for other tokens; set it to False",
    ),
)
# Options that draw a mask over activations, one number for each token and feature: what the ranks must draw apart.
TOKEN_MASKS = {
    "ADALORA": "lora_dropout",
    "DEFT": "deft_dropout",
    "DELORA": "module_dropout",
    "FROD": "frod_dropout",
    "GRALORA": "gralora_dropout",
    "HIRA": "hira_dropout",
    "LORA": "lora_dropout",
    "MISS": "miss_dropout",
    "PSOFT": "psoft_dropout",
    "PVERA": "pvera_dropout",
    "RANDLORA": "randlora_dropout",
    "SUPERTUNING": "lora_dropout",
    "TINYLORA": "tinylora_dropout",
    "UNILORA": "unilora_dropout",
    "VBLORA": "vblora_dropout",
    "VERA": "vera_dropout",
}


def check_adapters(model: Any) -> None:
    """Raises NotImplementedError naming the first adapter of a model, and its option, that cannot be exact.

    Adapters that are loaded count, not only the active ones: PEFT switches between them without telling anyone.
    """
    for adapter, config in _adapters(model.modules()):
        kind = peft_type(config)
        who = f"the adapter {adapter!r} is of PEFT's type {kind}"
        if kind in REFUSED:
            raise NotImplementedError(f"{who}, which is not supported: {REFUSED[kind]}")
        if kind not in EXACT:
            raise NotImplementedError(
                f"{who}, which is not on ringattn's list: whether it treats each token alone is not known. Merge it "
                f"into the weights (merge_and_unload) or take one of {', '.join(sorted(EXACT))}"
            )
        for rule in RULES:
            value = getattr(config, rule.option, None)
            if kind in rule.types and not rule.exact(value):
                raise NotImplementedError(f"{who} with {rule.option}={value!r}, which is not supported: {rule.reason}")


def loaded_adapters(model: Any) -> tuple[tuple[str, int], ...]:
    """What changes when an adapter is added, taken away or replaced. Cheap: no walk through the whole model."""
    parts = [model, *(part for part in model.children())]
    return tuple((adapter, id(config)) for adapter, config in _adapters(parts))


def peft_type(config: Any) -> str:
    """The name of an adapter's type, such as "LORA"."""
    kind = getattr(config, "peft_type", None)
    return str(getattr(kind, "value", kind))


def _adapters(parts: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """(name, configuration) of every adapter: PEFT leaves them with the model that it changes and with its wrappers."""
    seen: set[int] = set()
    for part in parts:
        # Prompts change no model: the wrapper alone has them, under the second name.
        configs = part.__dict__.get("peft_config") or part.__dict__.get("_peft_config")
        for adapter, config in (configs if isinstance(configs, dict) else {}).items():
            if id(config) not in seen:
                seen.add(id(config))
                yield adapter, config
