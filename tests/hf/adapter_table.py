"""The table of PEFT's adapters and of what else looks past one token: docs/peft.md.

    python -m tests.hf.adapter_table docs/peft.md      # measures every case on two ranks, in a minute

The refusals are those of `ringattn.hf.adapters` and `ringattn.hf.configuration`, which a model meets too.
"""

import importlib.util
import platform
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch

from ringattn.hf import configuration
from ringattn.hf.adapters import REFUSED, RULES, TOKEN_MASKS
from tests.hf.configuration_keys import INERT_KEYS, ROUTER_KEYS, TOKEN_KEYS
from tests.hf.tuners import CASES, NEEDS, measured
from tests.pool import Pools

DOCUMENT = Path(__file__).parents[2] / "docs" / "peft.md"
# Draws that are made once, with an adapter: its parameters are compared over the ranks.
INITIAL = {
    "proj_seed",
    "projection_prng_key",
    "projection_seed",
    "random_loc_seed",
    "random_seed",
    "rank_dropout_scale",
}
_DATA = "read when an adapter is made; refused while it collects from a parallelized model"
_NAMES = "which layers get an adapter"
LORA_OPTIONS: dict[str, tuple[str, str]] = {
    "alora_invocation_tokens": ("refused", ""),
    "alpha_pattern": ("tested", ""),
    "arrow_config": ("tested", "test_adapters_in_use.py: the expert of a token is chosen from the token alone"),
    "bias": ("tested", ""),
    "corda_config": ("inert", _DATA),
    "ensure_weight_tying": ("inert", "which parameters are one"),
    "eva_config": ("inert", _DATA),
    "exclude_modules": ("inert", _NAMES),
    "fan_in_fan_out": ("inert", "how a weight is stored"),
    "init_lora_weights": ("tested", "mica and pissa; the result is compared over the ranks at the first forward pass"),
    "kasa_config": ("tested", ""),
    "layer_replication": ("refused", ""),
    "layers_pattern": ("inert", _NAMES),
    "layers_to_transform": ("inert", _NAMES),
    "loftq_config": ("inert", "read when an adapter is made"),
    "lora_alpha": ("inert", "a factor"),
    "lora_bias": ("tested", ""),
    "lora_dropout": ("tested", "test_local_draws.py: drawn apart"),
    "lora_ga_config": ("inert", _DATA),
    "megatron_config": ("inert", "for Megatron's layers, which transformers has not"),
    "megatron_core": ("inert", "for Megatron's layers, which transformers has not"),
    "modules_to_save": ("tested", "also of the head, and added after parallelize"),
    "monteclora_config": ("refused", ""),
    "qalora_group_size": ("tested", ""),
    "r": ("tested", ""),
    "rank_pattern": ("tested", ""),
    "runtime_config": ("inert", "where an adapter is made"),
    "target_modules": ("tested", "linear layers, embeddings and the head"),
    "target_parameters": ("tested", "experts"),
    "trainable_token_indices": ("tested", ""),
    "use_bdlora": ("tested", ""),
    "use_dora": ("tested", ""),
    "use_qalora": ("tested", ""),
    "use_rslora": ("tested", ""),
    "velora_config": ("refused", ""),
}


def refusal_rows() -> Iterator[str]:
    """Lines of the tables that come from the lists alone."""
    for kind, reason in sorted(REFUSED.items()):
        yield f"| `{kind}` | {reason} |"
    for rule in RULES:
        yield f"| {', '.join(f'`{kind}`' for kind in rule.types)} | `{rule.option}` | {rule.reason} |"
    for option, (verdict, words) in LORA_OPTIONS.items():
        reason = next((rule.reason for rule in RULES if rule.option == option), "")
        yield f"| `{option}` | {verdict} | {'; '.join(filter(None, (reason, words)))} |"
    for key, reason in sorted(configuration.REFUSED.items()):
        yield f"| `{key}` | refused | {reason} |"
    for key, reason in sorted((TOKEN_KEYS | ROUTER_KEYS | INERT_KEYS).items()):
        yield f"| `{key}` | {'inert' if key in INERT_KEYS else 'tested'} | {reason} |"


PAGE = """# Adapters, configuration keys and random draws: what is exact, and what is refused

Made by `python -m tests.hf.adapter_table docs/peft.md`; not to be edited.

Last run: {stamp}.

A parallelized model gives each rank a part of the tokens of a sequence. What treats each token alone is exact; what
looks at other tokens, at their number or at the batch as a whole, or draws a random number that all ranks must share,
is not, and is refused by name: in `parallelize` where it is there already, and before the forward pass where an adapter
is added, or a configuration changed, later.

## PEFT's adapters

Tiny models with an adapter drawn wide, in training mode, two packed documents and padding on 2 ranks (zigzag), against
**each document run alone**: the largest relative error of the loss, and of the gradient of any parameter that is
trained (the limit is 1e-5).

| adapter | loss | gradients |
| --- | --- | --- |
{exact}

Refused, by their type:

| type | reason |
| --- | --- |
{kinds}

Refused, by an option:

| type | option | reason |
| --- | --- | --- |
{options}

A type that is on neither list, of a later version of PEFT, is refused until somebody has looked at it: whether an
adapter treats each token alone cannot be seen from outside. Merge it into the weights, or add a case to
`tests/hf/tuners.py` and, if it is exact, the type to `ringattn/hf/adapters.py`.

Make adapters from the same seed on every rank, or broadcast them: at the first forward pass the ranks of a sequence
compare what they train, and again when an adapter is added. AdaLoRA's and AdaMSS' allocation of ranks looks at
gradients: call it after they are averaged over ranks.

### LoRA's options

| option | | |
| --- | --- | --- |
{lora}

`adapter_names` picks an adapter for each row of a batch, in evaluation: a packed batch is one row, and takes one name.

## Configuration keys of transformers

| key | | |
| --- | --- | --- |
{keys}

## Random draws

Ranks start from the same seed, so that data, batches and new weights are equal. In a training forward pass every rank
draws from a generator of its own, seeded from the state outside and from the rank: masks of different tokens are drawn
apart, a run repeats from its seed and goes on from its checkpoint, and recomputed layers (both kinds of gradient
checkpointing) draw what they drew. Outside, the generator is as equal as before, whatever a rank drew. See
`ringattn/hf/local_draws.py`. Dropout of attention is refused: its mask belongs to pairs of tokens of different ranks.
Masks over tokens are drawn by {masks}.
"""


def page(rows: list[str]) -> str:
    """The page, with the rows of the adapters that were measured."""
    import peft
    import transformers

    lists = list(refusal_rows())
    kinds, options = len(REFUSED), len(REFUSED) + len(RULES)
    keys = options + len(LORA_OPTIONS)
    versions = f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    return PAGE.format(
        stamp=f"{datetime.now(UTC):%Y-%m-%d}; {versions}, Python {platform.python_version()}, float32 on gloo",
        exact="\n".join(rows),
        kinds="\n".join(lists[:kinds]),
        options="\n".join(lists[kinds:options]),
        lora="\n".join(lists[options:keys]),
        keys="\n".join(lists[keys:]),
        masks=", ".join(f"`{option}` ({kind})" for kind, option in TOKEN_MASKS.items()),
    )


def main(path: str) -> None:
    pools = Pools()
    rows = []
    for case in CASES:
        if case in NEEDS and importlib.util.find_spec(NEEDS[case]) is None:
            sys.exit(f"{case} needs {NEEDS[case]}")
        errors = pools(2).run(measured, case)
        loss, gradients = (max(getattr(e, name) for e in errors) for name in ("loss", "gradients"))
        rows.append(f"| `{case}` | {loss:.1e} | {gradients:.1e} |")
    pools.close()
    Path(path).write_text(page(rows))


if __name__ == "__main__":
    main(sys.argv[1])
