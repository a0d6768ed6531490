"""The conformance matrix: every family × form of batch × mesh against documents run alone, and its committed table.

    python -m tests.hf.matrix docs/hugging-face.md      # runs all of it, on two CPU cores in a few minutes
    python -m tests.hf.matrix docs/hugging-face.md mamba2 jamba    # these families alone; the other rows stay

`run` is also what the tests call, for a sample on every change and for the whole with `-m nightly`.
"""

import platform
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch

from ringattn import Layout
from ringattn.hf import conformance
from ringattn.hf.conformance import FORMS, Errors, Form, Outcome
from ringattn.hf.model import parallelize
from ringattn.hf.recurrent import KNOWN, LIGHTNING
from tests.hf.families import FAMILIES, MESHES, SINCE, model_of, placed_on
from tests.hf.refusals import REFUSALS
from tests.parallel.ranks import mesh_of
from tests.pool import Pools

TOLERANCE = 1e-5
COUNTS = 1e-3  # a feature counts if the logits move by more when one layer leaves it out
# What layers with a state are called in the table, by the function that mixes their tokens.
STATES = {
    "causal_conv1d_fn": "convolution",
    "torch_chunk_gated_delta_rule": "gated delta rule",
    "chunk_kimi_delta_attention": "Kimi delta attention",
    "mamba2_chunk_scan": "Mamba-2",
    "mamba_selective_scan": "Mamba-1",
    LIGHTNING: LIGHTNING,
}


@dataclass(frozen=True)
class Row:
    """One family on one mesh."""

    family: str
    mesh: str
    errors: dict[str, Errors]
    leak: float
    inside: float
    changes: dict[tuple[int, str], float]
    asked: dict[int, frozenset[str]]
    expected: dict[int, frozenset[str]]

    @property
    def worst(self) -> float:
        return max(max(e.logits, e.loss, e.gradients) for e in self.errors.values())

    def failures(self) -> list[str]:
        """What is wrong, in words; empty if the family conforms."""
        found = [f"{form}: {errors}" for form, errors in self.errors.items() if not errors.within(TOLERANCE)]
        if self.leak != 0.0 or not self.inside > 0.0:
            found.append(f"leak: gradient {self.leak} outside of a document, {self.inside} inside")
        if self.asked != self.expected:
            found.append(f"features: layers ask for {self.asked}, the model needs {self.expected}")
        needed = {(layer, feature) for layer, features in self.expected.items() for feature in features}
        if needed != set(self.changes):
            found.append(f"features: {needed} are needed, {set(self.changes)} were left out in turn")
        found += [f"{at} moves the logits by {x} only" for at, x in self.changes.items() if not x > COUNTS]
        return found


@cache
def truth_of(family: str, form: Form) -> Outcome:
    return conformance.alone(model_of(family), form)


def row(family: str, mesh_name: str, forms: tuple[Form, ...] = FORMS) -> Row:
    """Run in every worker of a mesh; all ranks return the same."""
    ring, ulysses, policy, scheme = MESHES[mesh_name]
    mesh, model = mesh_of(ring, ulysses), model_of(family)
    truths = {form.name: truth_of(family, form) for form in forms}
    handle = parallelize(model, mesh, scheme=scheme)
    try:
        with placed_on(mesh_name):
            held = [Layout(FORMS[0].docs, mesh, policy).tokens(rank) for rank in range(mesh.sequence_size)]
            assert (0 in held) == (mesh_name == "empty rank")
            errors = {
                form.name: conformance.differences(conformance.together(model, mesh, form, policy), truths[form.name])
                for form in forms
            }
            leak = conformance.leak(model, mesh, FORMS[3], 1, policy)
            changes = conformance.feature_changes(model, mesh, handle, FORMS[0])
    finally:
        handle.undo()
    expected = conformance.expected_features(model)
    return Row(family, mesh_name, errors, leak.outside, leak.inside, changes, handle.asked, expected)


def run(pools: Pools, families: Iterable[str], meshes: Iterable[str], forms: tuple[Form, ...] = FORMS) -> list[Row]:
    """The rows of every family on every mesh."""
    rows = []
    for mesh in meshes:
        ring, ulysses, *_ = MESHES[mesh]
        cases = [(family, mesh, forms) for family in families]
        rows += [ranks[0] for ranks in pools(ring * ulysses).run_many(row, cases, timeout=900.0)]
    return rows


def document(rows: list[Row], seconds: float, before: str = "") -> str:
    """The table as Markdown.

    Arguments:
        before: the page as it was, from which the rows of families that were not run are taken.
    """
    import transformers

    kept = {line.split("|")[1].strip(" `"): line for line in before.splitlines() if line.startswith("| `")}
    ran = list(dict.fromkeys(row.family for row in rows))
    failures = [f"{row.family} on {row.mesh}: {text}" for row in rows for text in row.failures()]
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    lines = [
        "# Hugging Face models: which families, which features, how verified",
        "",
        "Made by `python -m tests.hf.matrix docs/hugging-face.md`; not to be edited.",
        "",
        f"{_whole_run(before) if before else f'Last full run: {date}, {seconds:.0f} s'}; "
        f"{len(FAMILIES) * len(MESHES) * len(FORMS)} cases, {len(failures)} failures; "
        f"transformers {transformers.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        "float32 on gloo.",
        *(["", f"Since then these were run ({date}): {', '.join(f'`{family}`' for family in ran)}."] if before else []),
        "",
        "Every family is built tiny with random weights (`ringattn/hf/tiny.py`) and compared with **each document run "
        "alone** through the same model with transformers' eager attention: logits, loss and the gradient of every "
        f"parameter, in {len(FORMS)} forms of batches ({', '.join(form.name for form in FORMS)}). A number is the "
        "largest relative error of all of them; the limit is 1e-5. Besides, for every family on every mesh: the "
        "gradient of one document's logits in the embeddings of the others is exactly 0; every attention layer was "
        "called once; each layer asks for the features that its configuration says; leaving one feature out of "
        f"one layer moves the logits by more than {COUNTS:g} (the smallest such change is shown).",
        "",
        "PEFT's adapters, configuration keys and random draws have a page of their own: [peft.md](peft.md).",
        "",
        f"| family | features | {' | '.join(MESHES)} | least change |",
        f"| --- | --- | {' | '.join('---' for _ in MESHES)} | --- |",
    ]
    for family in FAMILIES:
        if family not in ran:
            lines.append(kept[family])
            continue
        mine = {row.mesh: row for row in rows if row.family == family}
        first = next(iter(mine.values()))
        cells = [f"{'✗ ' if mine[mesh].failures() else ''}{mine[mesh].worst:.1e}" for mesh in MESHES]
        least = min((x for row in mine.values() for x in row.changes.values()), default=None)
        lines.append(
            f"| `{family}` | {feature_words(family, first)} | {' | '.join(cells)} | "
            f"{'–' if least is None else f'{least:.0e}'} |"
        )
    lines += ["", *(f"- ✗ {text}" for text in failures), *([""] if failures else [])]
    lines += [
        "What is refused, before anything is installed or at the first forward pass (tested by name):",
        "",
        "| family | words |",
        "| --- | --- |",
        *(f"| `{family}` | {words}{SINCE.get(family, '')} |" for family, words in REFUSALS.items()),
    ]
    return "\n".join(lines) + "\n"


def _whole_run(page: str) -> str:
    """When all rows of a page were run, as it says itself."""
    (line,) = [line for line in page.splitlines() if line.startswith("Last full run: ")]
    return line.partition(" s, ")[0].partition(" s; ")[0] + " s"


def feature_words(family: str, found: Row) -> str:
    """What the attention of a family has: from its configuration and from what its layers asked for."""
    given = model_of(family).config.to_dict()
    words = ["GQA"] if given.get("num_key_value_heads") not in (None, given.get("num_attention_heads")) else ["MHA"]
    for feature in conformance.FEATURES:
        layers = [layer for layer, asked in found.asked.items() if feature in asked]
        share = "" if len(layers) == len(found.asked) else f" in {len(layers)} of {len(found.asked)}"
        words += [feature + share] if layers else []
    kinds = sorted({mixing for layer in model_of(family).modules() for mixing in KNOWN.get(type(layer).__name__, ())})
    words = ([] if kinds and not found.asked else words) + [STATES[kind] for kind in kinds if kind in STATES]
    if given.get("v_head_dim"):
        words.append("V ≠ D")
    if given.get("per_layer_config"):
        words.append("head dims by layer")
    return ", ".join(words)


def main(path: str, *families: str) -> int:
    before = Path(path).read_text() if families else ""
    pools = Pools()
    started = time.perf_counter()
    try:
        rows = run(pools, families or FAMILIES, MESHES)
    finally:
        pools.close()
    Path(path).write_text(document(rows, time.perf_counter() - started, before))
    failed = [row for row in rows if row.failures()]
    print(f"{len(rows)} rows, {len(failed)} failed, written to {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
