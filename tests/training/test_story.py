"""The tutorial's story: its commands are those that are measured, and come to a model that transformers loads alike."""

import contextlib
import io
import os
import re
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from benchmarks import story
from benchmarks.story import CPU, SCALES, TINY, Told, commands, shown, table, tell
from ringattn import Documents, Layout
from ringattn.cli import main
from ringattn.hf import attention_kwargs
from ringattn.training.evaluation.opened import open_model
from tests.parallel.ranks import mesh_of
from tests.pool import Pools
from tests.training.evaluation.test_evaluate import prepared
from tests.training.forked import ROOT, all_end, fork_rank
from tests.training.test_runs import free_port, variables_of

TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TUTORIAL, re.M | re.S)


def test_the_tutorial_has_the_commands_that_are_measured() -> None:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    typed = [shlex.split(line) for line in lines if line]
    assert [words for words in typed if words[1] != "data"] == [shlex.split(one) for one in commands(CPU, 0)]


def in_forks(command: str, folder: Path) -> None:
    """A command without what takes longest: starting Python and importing. Ranks are two forks."""
    _, name, *words = shlex.split(command)
    with contextlib.chdir(folder):
        if name not in ("train", "evaluate"):
            with contextlib.redirect_stdout(io.StringIO()):
                assert main([name, *words]) == 0
            return
        log, port = folder / "ranks.log", free_port()
        log.unlink(missing_ok=True)
        script, there = str(ROOT / "recipes" / f"{name}.py"), partial(os.chdir, folder)
        ranks = [fork_rank(words, variables_of(rank, 2, port), log, log, there, script) for rank in range(2)]
        assert all_end(ranks, 200), log.read_text()
        assert [rank.exitcode for rank in ranks] == [0, 0], log.read_text()


def logits_of(run: Path, ids: torch.Tensor) -> torch.Tensor:
    """(tokens, vocabulary) logits of a run by its own checkpoint."""
    job = prepared(f"model.run={run}", "wording=plain", "lengths=[200]")
    mesh = mesh_of(1, 1)
    model = open_model(job.source, job.settings, mesh)
    layout = Layout(Documents([len(ids)]), mesh)
    with torch.no_grad():
        out = model(
            input_ids=ids[None], position_ids=torch.arange(len(ids))[None], use_cache=False, **attention_kwargs(layout)
        )
    logits: torch.Tensor = out.logits[0]
    return logits


def test_a_story_that_was_broken_off_goes_on(tmp_path: Path) -> None:
    ran: list[str] = []

    def two_at_a_time(command: str, folder: Path) -> None:
        ran.append(command if len(ran) % 3 < 2 else "")
        if not ran[-1]:
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            tell(TINY, 0, tmp_path, two_at_a_time)
    assert [command for command in ran if command] == commands(TINY, 0)[:4]


@pytest.mark.slow
def test_the_story_in_small(tmp_path: Path, pool: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is learned in so few steps; every command does what the next one needs."""
    monkeypatch.setenv("HOME", str(tmp_path))  # of the cache of tokens
    told = tell(TINY, 0, tmp_path, in_forks)
    assert told.logprob_error <= 1e-5
    assert len(told.before) == len(told.after) == len(TINY.lengths)
    page = (tmp_path / "long" / "report.html").read_text()
    for part in ("before/needle", "after/needle", 'class="state done"', "theta: 80000", "2 ranks"):
        assert part in page, part
    assert page.count("data:image/png;base64,") == 6  # both heat maps and the plan, each shown and to be saved
    from transformers import AutoModelForCausalLM

    ids = torch.randint(0, 600, (1000,), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "extended")
    assert model.config.max_position_embeddings == TINY.long.length
    with torch.no_grad():
        found = model(ids[None]).logits[0]
    torch.testing.assert_close(found, pool(1).run(logits_of, tmp_path / "long", ids)[0], rtol=0, atol=1e-5)
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(blocks("python")[-1], "tutorial.md", "exec"), {})
    assert printed.getvalue().count(" tokens\n") == 4
    story.keep(tmp_path, tmp_path, "story-tiny")
    assert (tmp_path / "story-tiny-before.png").read_bytes() != (tmp_path / "story-tiny-after.png").read_bytes()


@pytest.mark.nightly
def test_the_story_as_the_tutorial_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    told = tell(CPU, 0, tmp_path)
    assert shown(CPU, told), told


def test_a_table_says_what_was_run_and_whether_it_shows_enough() -> None:
    means = (1.0, 0.9, 0.1, 0.1), (1.0, 1.0, 0.9, 0.8)
    enough = Told(0, CPU.lengths, *means, (0.1, 0.85), 0.7, 1e-6, (60.0,) * 10)
    assert shown(CPU, enough)
    text = table("cpu", [enough])
    assert (
        "| 0 | 100 % | 90 % | 10 % | 10 % | 100 % | 100 % | 90 % | 80 % | 10 % | 85 % | 92 % | 70 % | 1.0e-06 | 10.0 |"
        in text
    )
    assert all(f"- 60 s: `{command}`" in text for command in commands(CPU, 0))
    for changes in (
        {"beyond": (0.3, 0.9)},
        {"beyond": (0.1, 0.5)},
        {"after": (0.9, 0.5, 0.4, 0.3)},
        {"logprob_error": 1e-4},
    ):
        assert not shown(CPU, Told(**{**vars(enough), **changes}))


def test_a_needle_near_its_question_says_nothing_of_length() -> None:
    scale = replace(CPU, lengths=(1024, 2048, 8192), depths=(0.0, 0.5, 0.9))
    table = [[0.0, 0.25, 0.5], [0.0, 0.0, 0.75], [0.0, 0.0, 1.0]]  # 0.9 of 8,192 leaves 819 tokens
    assert story.beyond(table, scale) == 0.5


@pytest.mark.parametrize("name", sorted(SCALES))
def test_lengths_lie_on_both_sides_of_the_first_training(name: str) -> None:
    scale = SCALES[name]
    assert min(scale.lengths) <= scale.short.length < max(scale.lengths) == scale.long.length
