"""What is wrong, and whose fault it is: every fault that a node can have is found among healthy ones."""

from collections.abc import Callable
from typing import Any

import pytest

from ringattn.preflight.checks import common
from ringattn.preflight.judge import judge
from tests.preflight.reports import GIB, bounds, healthy


def problems(reports: dict[int, Any], **changes: Any) -> list[tuple[str, tuple[int, ...]]]:
    checks = judge(reports, bounds(**{"nodes": len(reports)} | changes))
    return [(problem.text, problem.nodes) for check in checks for problem in check.problems]


@pytest.mark.parametrize("nodes", [1, 2, 5])
def test_healthy_nodes_have_no_problems(nodes):
    assert problems(healthy(nodes)) == []
    remarks = [text for check in judge(healthy(nodes), bounds(nodes)) for text in check.remarks]
    assert remarks == []


def test_a_node_that_is_missing_is_named():
    reports = healthy(4)
    del reports[2]
    for report in reports.values():
        for rank in report["ranks"]:
            rank["links"] = [link for link in rank["links"] if link["peer"][0] != 2]
    found = problems(reports, nodes=("a", "b", "c", "d"))
    assert found == [("node 2 (c) did not come, or stopped answering", (2,))]


def rank_of(report: Any) -> Any:
    return report["ranks"][1]


FAULTS: dict[str, tuple[Callable[[Any], Any], list[str]]] = {
    "version": (lambda report: report["versions"].update(torch="2.12.0"), ["has torch 2.12.0, others have 2.13.0"]),
    "nothing": (lambda report: report["versions"].update(python=None), ["has python not at all, others have 3.12.1"]),
    "clock": (lambda report: report.update(clock={"ahead": -7.5, "error": 0.1}), ["clock", "7.5 s behind node 0's"]),
    "disk": (lambda report: report["folders"]["output"].update(free=GIB), ["/shared/out has 1.0 GiB", "10 GiB"]),
    "read-only": (lambda report: report["folders"]["cache"].update(error="no way"), ["cache folder", "no way"]),
    "no folder": (lambda report: report.update(unsigned="Permission denied"), ["/shared/out", "Permission denied"]),
    "files": (lambda report: report["limits"].update(open_files=256), ["256 open files (ulimit -n), 1024 are needed"]),
    "shm": (lambda report: report["limits"].update(shared_memory=1 << 26), ["/dev/shm has 0.06 GiB free"]),
    "memlock": (lambda report: report["limits"].update(locked_memory=1 << 23), ["locked memory", "InfiniBand"]),
    "kernel": (lambda report: report["kernels"].update(auto="torch"), ["takes the kernel torch, others take fa4"]),
    "no kernel": (lambda report: report["kernels"].update(auto=None, problem="nothing works"), ["nothing works"]),
    "memory": (lambda report: rank_of(report)["memory"].update(wrong=3), ["device 1", "3 words", "wrong"]),
    "bits": (lambda report: rank_of(report)["product"].update(digest="abd"), ["device 1", "other bits than on most"]),
    "unsteady": (lambda report: rank_of(report)["product"].update(same=False), ["device 1", "from time to time"]),
    "slow": (lambda report: rank_of(report)["product"].update(seconds=3e-3), ["device 1", "333 TFLOP/s", "1e+03"]),
    "died": (lambda report: rank_of(report).update(product=None, links=[], error="exit code -9"), ["exit code -9"]),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("node", [0, 3])
def test_a_fault_of_one_node_is_found_and_the_node_named(fault, node):
    reports = healthy(4)
    change, words = FAULTS[fault]
    change(reports[node])
    [(text, nodes)] = problems(reports)
    assert nodes == (node,)
    assert f"node {node} (host{node})" in text
    assert all(word in text for word in words), text


def test_a_folder_that_is_not_shared_is_told_once_for_each_node_that_does_not_see():
    reports = healthy(3)
    reports[1]["unseen"] = [0, 2]
    [(text, _)] = problems(reports)
    who, what = text.split(": ")
    assert who == "/shared/out is not shared"
    assert what == "node 1 (host1) does not see what was written there by node 0 (host0), node 2 (host2)"


def test_variables_that_differ_are_odd_but_not_wrong():
    reports = healthy(3)
    reports[2]["environment"] = {}
    checks = judge(reports, bounds(3))
    assert not any(check.problems for check in checks)
    assert [text for check in checks for text in check.remarks] == [
        "NCCL_DEBUG differs: node 0 (host0): WARN, node 2 (host2): unset"
    ]


def test_more_ranks_need_more_open_files():
    reports = healthy(2)
    for report in reports.values():
        report["limits"]["open_files"] = 1024
        report["ranks"] = [rank | {"links": []} for rank in report["ranks"] * 50]
    assert problems(reports) == []
    for report in reports.values():
        report["ranks"] *= 2
    assert len(problems(reports)) == 2
    assert "1600 are needed" in problems(reports)[0][0]


def test_a_gpu_far_below_its_data_sheet_is_slow_though_all_are_alike():
    reports = healthy(2)
    for report in reports.values():
        for rank in report["ranks"]:
            rank["device"], rank["product"]["seconds"] = "NVIDIA H200", 1.0
    assert len(problems(reports)) == 4
    assert "1 TFLOP/s of 989 by data sheet" in problems(reports)[0][0]


def test_a_node_that_nobody_reaches_is_blamed_once():
    reports = healthy(4)
    for node in (0, 1, 3):
        reports[node]["unreached"] = {"2": "timed out"}
    reports[2]["unreached"] = {"0": "timed out", "1": "timed out", "3": "timed out"}
    [(text, nodes)] = problems(reports)
    assert nodes == (2,)
    assert text == "node 2 (host2) and other nodes do not reach each other (timed out)"


def test_between_two_nodes_nobody_is_blamed():
    reports = healthy(2)
    reports[1]["unreached"] = {"0": "refused"}
    assert problems(reports) == [("node 1 (host1) does not reach node 0 (host0) (refused)", ())]


@pytest.mark.parametrize(
    ("nodes", "pairs", "blamed"),
    [
        (4, [(0, 1), (1, 2), (1, 3)], [1]),
        (4, [(0, 1)], []),
        (2, [(0, 1)], []),
        (8, [(0, 1), (1, 2)], []),
        (8, [(a, b) for a in (2, 5) for b in range(8) if a != b], [2, 5]),
        (3, [], []),
    ],
)
def test_blame_falls_on_what_most_pairs_have_in_common(nodes, pairs, blamed):
    assert common(range(nodes), pairs) == blamed
