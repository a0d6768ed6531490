"""Ranks that do not agree are told apart: at the start before anything can hang, and in every step afterwards."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

from ringattn.training.health.incidents import read_incidents
from ringattn.training.ranks import differences, joined, listed
from ringattn.training.start.agreement import Agreement, Disagreement, code_version, digest_of, record_of
from tests.training import fault_rows
from tests.training.fault_rows import Fault
from tests.training.recipe import prepared


def test_ranks_in_words():
    assert listed([3]) == "rank 3"
    assert listed([1, 0]) == "ranks 0, 1"
    assert listed([0, 1, 2, 5, 7, 8, 9]) == "ranks 0 to 2, 5, 7 to 9"


def test_differences_name_the_key_the_values_and_the_ranks():
    one, other = {"optim.lr": 3e-4, "a": [1]}, {"optim.lr": 1e-3, "a": [1], "b": None}
    assert differences([one, one]) == []
    assert differences([one, one, other]) == [
        "optim.lr is 0.0003 on ranks 0, 1 and 0.001 on rank 2",
        "b is (absent) on ranks 0, 1 and null on rank 2",
    ]
    assert joined([str(number) for number in range(12)]).endswith("8; 9; and 2 more")


def test_secrets_are_compared_and_not_shown():
    (line,) = differences([{"model.config.api_key": "first one"}, {"model.config.api_key": "second"}])
    assert line == "model.config.api_key is <redacted> on rank 0 and <redacted> on rank 1"


def test_a_record_changes_with_what_shapes_a_run_and_not_with_places_of_files(tmp_path):
    text = tmp_path / "some.txt"
    text.write_text("It is said that a text is a document. " * 50)
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere" / "same.txt"
    copy.write_text(text.read_text())
    common = ("data=text", "data.tokenizer=bytes", f"run.output={tmp_path / 'run'}", "data.seq_len=128")
    cache, other_cache = f"data.cache={tmp_path / 'c'}", f"data.cache={tmp_path / 'd'}"
    job = prepared(*common, f"data.files=[{text}]", cache)
    mine = digest_of(record_of(job))
    assert digest_of(record_of(prepared(*common, f"data.files=[{copy}]", other_cache))) == mine
    assert digest_of(record_of(prepared(*common, f"data.files=[{text}]", cache, "optim.lr=0.1"))) != mine
    assert digest_of(record_of(replace(job, corpus=replace(job.corpus, fingerprint="other")))) != mine
    assert "the code ringattn/training/start/agreement.py" in code_version()


def compared(output, facts: dict[int, dict[str, object]]) -> str:
    agreement = Agreement(output, torch.device("cpu"), 10)
    assert [agreement.due(step) for step in (7, 8, 10, 11)] == [True, False, True, False]
    try:
        agreement.compare(20, facts.get(dist.get_rank(), facts[0]))
    except Disagreement as error:
        return str(error)
    return ""


def test_a_run_compares_its_ranks(pool, tmp_path):
    alike = {"steps done": 20, "buffers": torch.tensor(5)}
    assert pool(2).run(compared, tmp_path, {0: alike}) == ["", ""]
    assert not read_incidents(tmp_path)
    first, second = pool(2).run(compared, tmp_path, {0: alike, 1: alike | {"buffers": torch.tensor(6)}})
    assert first == second == "ranks are not one run any more after step 20: buffers is 5 on rank 0 and 6 on rank 1"
    (incident,) = read_incidents(tmp_path)
    assert (incident["kind"], incident["step"], incident["message"]) == ("disagreement", 20, first)


def assert_one_refusal(found: Fault, *words: str) -> None:
    assert set(found.codes) == {2}
    errors = [line for line in found.said.splitlines() if line.startswith("error")]
    assert len(errors) == 1, found.said
    assert all(word in errors[0] for word in words), errors[0]
    assert "Traceback" not in found.said
    assert found.seconds < 60


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lr=0.005", ["optim.lr is", "on ranks 0, 1 and 0.005 on rank 2"]),
        ("run.steps=31", ["run.steps is 30 on ranks 0, 1 and 31 on rank 2"]),
        ("data.seq_len=512", ["data.seq_len is 384 on ranks 0, 1 and 512 on rank 2"]),
    ],
)
def test_another_configuration(override, words, tmp_path):
    assert_one_refusal(fault_rows.other_configuration(tmp_path, override), *words)


@pytest.mark.slow
def test_other_documents(tmp_path):
    assert_one_refusal(
        fault_rows.other_documents(tmp_path), "the documents is", "on rank 0 and", "on rank 1", "data.files"
    )


@pytest.mark.slow
def test_other_code(tmp_path):
    assert_one_refusal(
        fault_rows.other_code(tmp_path), "the code ringattn/training/loop.py is", "0123456789ab on rank 1"
    )


@pytest.mark.slow
def test_a_refusal_of_another_rank_than_0_is_heard(tmp_path):
    assert_one_refusal(fault_rows.refused_rank(tmp_path), "rank 1 cannot start", "run.steps", "-3")


@pytest.mark.slow
def test_an_absent_rank_is_named(tmp_path):
    found = fault_rows.absent_rank(tmp_path)
    assert found.codes[0] == 2
    assert "error: rank 1 did not come within run.start_timeout=2 s" in found.said


@pytest.mark.slow
def test_another_batch_ends_the_run_in_its_step(tmp_path):
    found = fault_rows.other_batch(tmp_path)
    assert set(found.codes) == {1}
    assert "after step 3: the packs of the step is" in found.said
    assert "on rank 0 and" in found.said
    assert found.seconds < 20
    assert found.steps_lost == 1


@pytest.mark.slow
def test_another_learning_rate_ends_the_run_in_its_step(tmp_path):
    found = fault_rows.other_learning_rate_later(tmp_path)
    assert set(found.codes) == {1}
    assert "after step 4: the learning rate is" in found.said
    assert found.seconds < 20
    assert found.steps_lost == 0
