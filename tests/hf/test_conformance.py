"""Families of transformers against documents run alone: a sample on every change, all of it with `-m nightly`."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from ringattn.hf.conformance import FORMS, Errors, Form
from ringattn.hf.model import parallelize
from ringattn.hf.tiny import read_config, tiny_config
from tests.hf.families import FAMILIES, LATER, MESHES
from tests.hf.matrix import TOLERANCE, Row, feature_words, run
from tests.hf.refusals import REFUSALS
from tests.parallel.ranks import mesh_of
from tests.pool import Pools

DOCUMENT = Path(__file__).parents[2] / "docs" / "hugging-face.md"
# The hardest: windows, sinks, unequal head dims, heads by layer, chunks, softcap, wide layers.
HARD = ("gpt_oss", "mimo_v2_flash", "llama4_text", "gemma2", "gemma4_text", "deepseek_v3", "qwen2_moe")
TABLE = {line.split("|")[1].strip(" `"): line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")}


def failures(rows: list[Row]) -> list[str]:
    return [f"{row.family} on {row.mesh}: {text}" for row in rows for text in row.failures()]


@pytest.mark.parametrize(
    "mesh",
    [
        "1 rank",
        "ulysses 2",
        "empty rank",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("ring 2", "hybrid 2×2")),
    ],
)
def test_hard_families(pool: Pools, mesh: str) -> None:
    assert not failures(run(pool, HARD, [mesh], (FORMS[1], FORMS[4], FORMS[5])))


@pytest.mark.slow
def test_every_family(pool: Pools) -> None:
    """On one mesh, in the two forms that hold the others: padding beside packing, and rows."""
    rows = run(pool, FAMILIES, ["zigzag 2"], (FORMS[4], FORMS[5]))
    assert not failures(rows)
    for row in rows:
        assert f"| {feature_words(row.family, row)} |" in TABLE[row.family], "run python -m tests.hf.matrix again"


@pytest.mark.nightly
@pytest.mark.parametrize("mesh", MESHES)
def test_whole_matrix(pool: Pools, mesh: str) -> None:
    assert not failures(run(pool, FAMILIES, [mesh]))


def test_the_table_is_of_these_families() -> None:
    text = DOCUMENT.read_text()
    assert "failures" in text
    assert f"{len(FAMILIES) * len(MESHES) * len(FORMS)} cases, 0 failures" in text
    assert "✗" not in text
    assert list(TABLE) == [*FAMILIES, *REFUSALS]
    for family in FAMILIES:
        errors = [float(cell) for cell in TABLE[family].split("|")[3 : 3 + len(MESHES)]]
        assert len(errors) == len(MESHES)
        assert max(errors) <= TOLERANCE
    for family, words in REFUSALS.items():
        assert words in TABLE[family]


def test_a_wrong_result_is_a_failure() -> None:
    """The judge itself: each kind of error must show."""
    good = Errors(1e-7, 1e-7, 1e-6, "x")
    needs = {0: frozenset({"window"})}
    row: dict[str, Any] = {"family": "llama", "mesh": "1 rank", "errors": {"plain": good}, "leak": 0.0, "inside": 1.0}
    row |= {"changes": {(0, "window"): 0.1}, "asked": needs, "expected": needs}
    assert not Row(**row).failures()
    wrong: list[dict[str, Any]] = [
        {"errors": {"plain": Errors(2e-5, 0.0, 0.0, "x")}},
        {"errors": {"plain": Errors(0.0, 2e-5, 0.0, "x")}},
        {"errors": {"plain": Errors(0.0, 0.0, 2e-5, "x")}},
        {"errors": {"plain": Errors(float("nan"), 0.0, 0.0, "x")}},
        {"leak": 1e-12},
        {"inside": 0.0},
        {"changes": {(0, "window"): 1e-4}},
        {"changes": {}},
        {"asked": {0: frozenset()}},
    ]
    for change in wrong:
        assert Row(**(row | change)).failures(), change


def refused(family: str) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = read_config(family)
    small = family in ("diffllama", "hrm_text", "doge")  # these are refused when they run
    config = tiny_config(config) if small else config
    with torch.device("cpu" if small else "meta"):
        maker = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = maker.from_config(config)
    handle = parallelize(model, mesh_of(1, 1))
    try:
        from ringattn.hf.conformance import together

        together(model, handle.mesh, FORMS[0])
    finally:
        handle.undo()


def has_interface(family: str) -> bool:
    """Whether this transformers calls the attention of a family through its AttentionInterface."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return bool(AutoModelForCausalLM.from_config(read_config(family))._supports_attention_backend)


@pytest.mark.parametrize("family", REFUSALS)
def test_refused_by_name(pool: Pools, family: str) -> None:
    if family in LATER and has_interface(family):  # then it must be exact
        assert not failures(run(pool, [family], ["1 rank", "zigzag 2", "ulysses 2"]))
        return
    with pytest.raises(NotImplementedError, match=REFUSALS[family]):
        pool(1).run(refused, family)


def test_forms_say_their_documents() -> None:
    from ringattn.hf.metadata import documents_of

    for form in [*FORMS, Form("left packed", ((3, 4), (7,)), 9, "segment_ids", "left")]:
        batch = form.batch(97)
        found = documents_of(batch, len(form.rows), form.size)
        assert (found.lengths, found.starts, found.total) == (form.docs.lengths, form.docs.starts, form.docs.total)
