"""PEFT's adapters: every type is exact, tested against documents run alone, or refused by name."""

import dataclasses
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft", reason="PEFT is not installed (pip install 'ringattn[hf]')")

from ringattn.hf import parallelize, shard_batch
from ringattn.hf.adapters import EXACT, REFUSED, RULES, TOKEN_MASKS, check_adapters
from tests.hf.adapter_table import DOCUMENT, INITIAL, LORA_OPTIONS, refusal_rows
from tests.hf.tuners import CASES, FORM, NEEDS, TARGETS, adapted, base_model, config_of, measured
from tests.parallel.ranks import mesh_of
from tests.pool import Pools

TOLERANCE = 1e-5


@pytest.mark.parametrize("case", CASES)
def test_every_exact_type_is_exact(pool: Pools, case: str) -> None:
    if case in NEEDS and importlib.util.find_spec(NEEDS[case]) is None:
        pytest.skip(f"{NEEDS[case]} is not installed")
    for errors in pool(2).run(measured, case):
        assert errors.within(TOLERANCE), errors


def test_every_type_is_known() -> None:
    from peft import PeftType

    assert {kind.value for kind in PeftType} <= EXACT | set(REFUSED)
    assert not EXACT & set(REFUSED)
    assert {case.partition(":")[0] for case in CASES} == EXACT


def test_every_option_of_lora_is_known() -> None:
    from peft import LoraConfig, PeftConfig

    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    assert {field.name for field in dataclasses.fields(LoraConfig)} - inherited == set(LORA_OPTIONS)
    refused = {rule.option for rule in RULES if "LORA" in rule.types}
    assert {option for option, (verdict, _) in LORA_OPTIONS.items() if verdict == "refused"} == refused
    for option, (verdict, words) in LORA_OPTIONS.items():
        if verdict == "tested":
            assert any(option in str(CASES[case]) for case in CASES) or "test_" in words, option


def test_every_option_that_draws_is_known() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        if kind.value in REFUSED:
            continue
        known = {rule.option for rule in RULES if kind.value in rule.types} | INITIAL | {TOKEN_MASKS.get(kind.value)}
        options = {field.name for field in dataclasses.fields(config)}
        drawing = {name for name in options if re.search("drop|noise|sampl|seed|generator|random|prng", name)}
        assert drawing <= known, kind


def test_the_table_is_of_this_list() -> None:
    text = DOCUMENT.read_text()
    for row in refusal_rows():
        assert row in text, "run python -m tests.hf.adapter_table again"
    measured_cases = re.findall(r"^\| `([^`]+)` \| ([\d.e+-]+) \| ([\d.e+-]+) \|", text, re.MULTILINE)
    assert [case for case, *_ in measured_cases] == list(CASES)
    assert all(max(float(loss), float(gradients)) <= TOLERANCE for _, loss, gradients in measured_cases)


@pytest.mark.parametrize("kind", TOKEN_MASKS)
def test_masks_over_tokens_have_a_row_for_each(kind: str) -> None:
    """What is drawn has a row for each token, and so may be drawn apart on every rank."""
    model = adapted(kind, **{**TARGETS, **CASES[kind], TOKEN_MASKS[kind]: 0.5}).train()
    shapes: list[torch.Size] = []
    for layer in model.modules():
        if isinstance(layer, nn.Dropout) and layer.p == 0.5:
            layer.register_forward_hook(lambda _, args, output: shapes.append(args[0].shape))
    tokens = 11
    model(input_ids=torch.arange(3, 3 + tokens)[None])
    assert len(shapes) == 12
    assert all(shape[:-1].numel() == tokens for shape in shapes)


# What it takes to make an adapter of a refused type.
GIVEN: dict[str, dict[str, Any]] = {
    "CARTRIDGE": {"num_virtual_tokens": 3},
    "CPT": {"cpt_token_ids": [3, 4], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
    "LILY": {**TARGETS, "r": 4},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 2, "num_tasks": 2},
    "POLY": {**TARGETS, "r": 4},
    "PREFIX_TUNING": {"num_virtual_tokens": 2},
    "PROMPT_TUNING": {"num_virtual_tokens": 2},
    "P_TUNING": {"num_virtual_tokens": 2, "encoder_hidden_size": 8},
    "SHADOW": {},
    "XLORA": {"hidden_size": 64, "xlora_depth": 1},
}
# Prompts change no model that could be looked at: they are seen by what they make of a batch.
PROMPTS = dict.fromkeys(("CPT", "MULTITASK_PROMPT_TUNING", "PROMPT_TUNING"), "2 tokens more than the batch")
PROMPTS |= {"P_TUNING": PROMPTS["CPT"]} | dict.fromkeys(("CARTRIDGE", "PREFIX_TUNING"), "past_key_values is not")


def local_batch() -> dict[str, Any]:
    return shard_batch(FORM.batch(97), None, mesh_of(2, 1), "zigzag")


def carries(kind: str, options: dict[str, Any], when: str) -> None:
    """A model that has an adapter before it is parallelized, after it, or after its first forward pass."""
    from peft import get_peft_model

    family = "llama" if "layer_replication" in options else "qwen3"
    model = base_model(family)
    model.config.use_cache = False
    if when != "before":
        parallelize(model, mesh_of(2, 1))
    if when == "later":
        model(**local_batch())
    torch.manual_seed(0)
    adapter = get_peft_model(model, config_of(kind, **options))
    if when == "before":
        parallelize(adapter, mesh_of(2, 1))
    tasks = {"task_ids": torch.zeros(1, dtype=torch.int64)} if kind in ("POLY", "MULTITASK_PROMPT_TUNING") else {}
    adapter.train()(**local_batch(), **tasks)


def expert(folder: str) -> None:
    adapted("LORA", r=4, **TARGETS).save_pretrained(folder)


@pytest.mark.parametrize("when", ["before", "after", "later"])
@pytest.mark.parametrize("kind", REFUSED)
def test_types_that_are_refused(pool: Pools, tmp_path: Path, kind: str, when: str) -> None:
    options = dict(GIVEN[kind])
    if kind == "XLORA":
        pool(1).run(expert, str(tmp_path))
        options["adapters"] = {"a": str(tmp_path)}
    words = PROMPTS.get(kind) if when != "before" else None
    with pytest.raises(NotImplementedError, match=words or f"of PEFT's type {kind}, which is not supported"):
        pool(2).run(carries, kind, options, when)


# For every option and type of the rules a value that is refused.
VALUES: dict[tuple[str, str], Any] = {
    ("LORA", "alora_invocation_tokens"): [3],
    ("LORA", "velora_config"): ("VeloraConfig", {"num_groups": 4, "init_type": "batch_average_once"}),
    ("LORA", "monteclora_config"): ("MontecloraConfig", {}),
    ("LORA", "layer_replication"): [[0, 3], [1, 4]],
    ("BOFT", "boft_dropout"): 0.1,
    ("LOHA", "module_dropout"): 0.1,
    ("LOKR", "module_dropout"): 0.1,
    ("OFT", "module_dropout"): 0.1,
    ("LOHA", "rank_dropout"): 0.1,
    ("LOKR", "rank_dropout"): 0.1,
    ("PVERA", "generator_seed"): 1,
    ("PVERA", "sample_at_inference"): True,
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("kind", "option"), VALUES)
def test_options_that_are_refused(pool: Pools, kind: str, option: str, when: str) -> None:
    options = {**TARGETS, **CASES[kind], option: VALUES[kind, option]}
    with pytest.raises(NotImplementedError, match=f"of PEFT's type {kind} with {option}="):
        pool(2).run(carries, kind, options, when)


def test_every_rule_has_a_value() -> None:
    ruled = {(kind, rule.option) for rule in RULES for kind in rule.types}
    assert {(kind.replace("ADALORA", "LORA"), option) for kind, option in ruled} == set(VALUES)


def test_a_type_of_a_later_version() -> None:
    model = nn.Linear(2, 2)
    model.peft_config = {"mine": SimpleNamespace(peft_type="NEWEST")}
    with pytest.raises(NotImplementedError, match="'mine' is of PEFT's type NEWEST, which is not on ringattn's list"):
        check_adapters(nn.Sequential(model))
