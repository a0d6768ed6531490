"""Slow and dead links, and whether it is the link or its node."""

from typing import Any

from ringattn.parallel.machine.shipped import SHIPPED
from ringattn.preflight.links import check_links
from tests.preflight.reports import bounds, healthy, slowed


def told(reports: dict[int, Any], **changes: Any) -> list[tuple[str, tuple[int, ...]]]:
    checks = check_links(reports, bounds(len(reports), **changes))
    return [(problem.text, problem.nodes) for check in checks for problem in check.problems]


def test_what_is_seen_has_both_ends_of_the_range():
    inside, between, answers = check_links(healthy(4), bounds(4))
    assert inside.seen == "4 pairs, 1 GB/s to 1 GB/s, latency 50 to 50 µs"
    assert between.seen == "12 pairs, 0.5 GB/s to 0.5 GB/s, latency 50 to 50 µs"
    assert answers.seen == ""


def test_one_slow_link_inside_a_node():
    reports = healthy(3)
    slowed(reports, (1, 0), (1, 1), 3)
    assert told(reports) == [
        ("node 1 (host1), between devices 0 and 1: 0.333 GB/s, usual here are 1 GB/s", (1,)),
    ]


def test_one_slow_link_between_nodes_is_nobodys():
    reports = healthy(4)
    slowed(reports, (1, 0), (2, 0), 10)
    text = "between node 1 (host1) and node 2 (host2), devices 0 and 0: 50 MB/s, usual here are 0.5 GB/s"
    assert told(reports) == [(text, ())]


def test_a_node_with_a_slow_port_is_named_with_the_device():
    reports = healthy(5)
    for other in (0, 1, 2, 4):
        slowed(reports, (3, 1), (other, 1), 4)
    [(text, nodes)] = told(reports)
    assert nodes == (3,)
    assert text.startswith("node 3 (host3): its links to 4 other nodes are slow, of its devices 1: 0.125 GB/s, usual")


def test_links_that_are_all_slow_are_found_by_what_is_expected():
    reports = healthy(3)
    assert told(reports) == []
    found = told(reports, machine=SHIPPED["H100"])
    assert "0.5 GB/s, expected 45 GB/s" in found[-1][0]
    assert told(reports, machine=SHIPPED["CPU"], slow=0.1) == []


def test_latency_counts_from_where_it_matters():
    reports = healthy(3)
    slowed(reports, (0, 0), (1, 0), 2.5, "small")
    assert told(reports) == []
    slowed(reports, (0, 0), (1, 0), 40, "small")
    [(text, _)] = told(reports)
    assert text.endswith("latency 5000 µs, usual here are 50 µs")
    assert told(reports, device="cpu", slow=0.005) == []


def test_ranks_that_wait_for_each_other_name_the_link_and_those_after_them_are_quiet():
    reports = healthy(3)
    waits = {(0, 1): [2, 1], (2, 1): [0, 1], (1, 1): [2, 1]}
    for (node, number), peer in waits.items():
        reports[node]["ranks"][number].update(waits_for=peer, error="timed out", links=[])
    text = "between node 0 (host0) and node 2 (host2), devices 1 and 1: no answer (timed out)"
    assert told(reports) == [(text, ())]


def test_a_rank_that_ends_while_others_do_not_wait_is_told_with_its_reason():
    reports = healthy(2)
    reports[1]["ranks"][0].update(error="its process ended with exit code -6: NCCL error")
    [(text, _)] = told(reports)
    assert text == "node 1 (host1), device 0, links: its process ended with exit code -6: NCCL error"


def test_nodes_that_were_left_out_shift_no_names():
    """Peers are numbered among the nodes whose links are measured."""
    reports = healthy(3)
    moved = {0: reports[0], 4: reports[1], 7: reports[2]}
    for report in moved.values():
        report["linked_nodes"] = [0, 4, 7]
    slowed({0: moved[0], 1: moved[4], 2: moved[7]}, (1, 0), (2, 0), 10)
    [(text, _)] = told(moved)
    assert text.startswith("between node 4 (host1) and node 7 (host2), devices 0 and 0")
