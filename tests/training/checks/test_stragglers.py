"""A rank that is slow by itself is told from those that wait for it."""

import json
import time

import pytest
import torch

pytest.importorskip("transformers")

from ringattn.training.checks import links
from ringattn.training.checks.links import links_of, slowest_link
from ringattn.training.checks.own_time import OwnTime, OwnTimes
from ringattn.training.checks.stragglers import Stragglers, late, table
from tests.training import fault_rows

USUAL = OwnTime(own=0.1, kernels=0.05, data=0.0, whole=0.2, looks=500)


def test_ranks_are_late_by_what_they_take_themselves():
    assert late([USUAL] * 4, 20, 100) == []
    slow = USUAL._replace(own=0.15)
    assert late([USUAL, slow], 20, 100) == [
        {"rank": 1, "what": "own time", "seconds": 0.15, "median": 0.1, "percent": 50}
    ]
    assert late([USUAL, slow], 60, 100) == []
    assert late([USUAL, slow], 20, 2) == []  # too few steps to tell it from chance
    assert late([USUAL, USUAL._replace(kernels=0.052)], 1, 100) == []  # a hundredth of a step
    both = late([USUAL, USUAL._replace(kernels=0.08), USUAL._replace(data=0.1)], 20, 100)
    assert [(one["rank"], one["what"], one["percent"]) for one in both] == [
        (2, "waiting for data", None),
        (1, "kernels on the GPU", 60),
    ]


def test_the_table_names_rank_host_and_cause():
    behind = [{"rank": 3, "host": "node7", "what": "own time", "seconds": 0.3, "median": 0.1, "percent": 200}]
    text = table({"steps": 100, "step": 200, "seconds": 0.4, "percent": 20, "behind": behind, "slowest_link": None})
    assert (
        text.splitlines()[0]
        == "slow ranks over 100 steps to step 200, of 0.400 s each (more than 20 % behind the median):"
    )
    assert text.splitlines()[-1].split() == ["3", "node7", "own", "time", "0.3000", "0.1000", "200", "%"]


def test_waits_in_collectives_are_not_ones_own_time(tmp_path):
    # What waits is told by the file that the innermost function is of.
    path = tmp_path / "torch" / "distributed" / "waiting.py"
    names: dict = {"sleep": time.sleep}
    exec(compile("def wait(seconds):\n    sleep(seconds)\n", str(path), "exec"), names)
    times = OwnTimes(torch.nn.Linear(2, 2), torch.device("cpu"))
    try:
        for _ in range(2):
            with times.step():
                time.sleep(0.1)
                names["wait"](0.3)
            time.sleep(0.1)  # between steps nothing counts
        times.waited(0.5)
        found = times.take()
        assert times.take().whole == 0
    finally:
        times.close()
    assert 0.4 <= found.whole < 5
    assert 0.1 < found.own / found.whole < 0.45
    assert found.data == 0.25


def test_the_slowest_link_is_told_apart_from_its_like():
    fast, between = [0.0, 0.01, 0.02, 0.02], [0.02, 0.02, 0.01, 0.0]
    rows = [fast, [0.01, 0.0, 0.02, 0.02], [0.02, 0.02, 0.0, 0.01], between]
    groups, hosts = [range(4)] * 4, ["a", "a", "b", "b"]
    usual = slowest_link(links_of(rows, groups, hosts), "cpu")
    assert usual is not None
    assert not usual["slow"], "links between machines take longer than those inside"
    rows[3][1] = 0.07  # one side's word
    link = slowest_link(links_of(rows, groups, hosts), "cpu")
    assert link is not None
    assert (link["ranks"], link["slow"], link["usual"], link["seconds"]) == ([1, 3], True, 0.02, 0.07)
    text = table({"step": 9, "behind": [], "slowest_link": {**link, "hosts": ["a", "b"]}})
    assert text == "slow link at step 9: ranks 1 (a) and 3 (b), 70.00 ms for 1 MiB both ways, usual 20.00 ms"
    assert slowest_link([], "cpu") is None


def slow_link(output):
    """The link between ranks 0 and 2 is slow, of four."""
    right = links._exchange

    def exchange(out, into, peer, group):
        if {peer, torch.distributed.get_rank(group)} == {0, 2}:
            time.sleep(0.2)
        return right(out, into, peer, group) + (0.2 if {peer, torch.distributed.get_rank(group)} == {0, 2} else 0)

    links._exchange = exchange
    group, device = torch.distributed.group.WORLD, torch.device("cpu")
    try:
        with Stragglers(output, torch.nn.Linear(2, 2), device, 1, 20, group) as stragglers:
            assert stragglers.compare(5, 1, USUAL) == []
    finally:
        links._exchange = right


def test_a_slow_link_is_named_though_nobody_is_slow(pool, tmp_path):
    pool(4).run(slow_link, tmp_path)
    (record,) = [json.loads(line) for line in (tmp_path / "stragglers.jsonl").read_text().splitlines()]
    assert record["behind"] == []
    assert record["slowest_link"]["ranks"] == [0, 2]
    assert record["slowest_link"]["slow"]


@pytest.mark.slow
def test_a_slow_rank_is_named(tmp_path):
    found = fault_rows.slow_rank(tmp_path)
    assert found.codes == [0, 0]
    records = [json.loads(line) for line in (tmp_path / "run" / "stragglers.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [10]
    (behind,) = records[0]["behind"]
    assert (behind["rank"], behind["what"]) == (1, "own time")
    assert behind["percent"] > 20
    assert behind["host"]
    assert "slow ranks over 9 steps to step 10" in found.said


@pytest.mark.slow
def test_a_slow_link_of_a_run_is_named(tmp_path):
    found = fault_rows.slow_link(tmp_path)
    assert found.codes == [0] * 4
    assert "slow link at step 4: ranks 1 (" in found.said
    assert ") and 3 (" in found.said
