"""Machines through JSON, by name, and what a transfer over their links takes."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from ringattn.parallel.machine.machine import Machine, transfer_seconds
from ringattn.parallel.machine.shipped import SHIPPED, shipped

H200 = SHIPPED["H200"]


@pytest.mark.parametrize("name", list(SHIPPED))
def test_machines_go_through_json(name: str) -> None:
    machine = SHIPPED[name]
    again = Machine.from_json(machine.to_json())
    assert again == machine
    assert again.digest == machine.digest
    assert replace(machine, copy_bandwidth=1.0).digest != machine.digest
    assert machine.provenance["origin"] == "shipped"


def test_copy_engines_are_priced_on_the_axes_that_have_them() -> None:
    copy = H200.links["node", "copy"]
    for ring, ulysses in ((True, True), (True, False), (False, True)):
        machine = H200.by_copy_engines(ring=ring, ulysses=ulysses)
        moved = {name: machine.links["node", name] for name in ("p2p", "all_to_all")}
        assert [link == copy for link in moved.values()] == [ring, ulysses]
        assert machine.engines == ("ring",) * ring + ("ulysses",) * ulysses
        assert all(machine.links[key] == link for key, link in H200.links.items() if key[0] == "network")
        assert Machine.from_json(machine.to_json()) == machine
        assert "copy engines" in machine.name
    assert H200.by_copy_engines(ring=False, ulysses=False) is H200
    older = json.loads(H200.to_json())
    del older["engines"]
    assert Machine.from_json(json.dumps(older)) == H200


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"links": {}, "rates": [{"wrong": 1}]}'])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not the JSON of a machine"):
        Machine.from_json(text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda fields: fields["links"].pop("node/copy"), "links must have node/copy"),
        (
            lambda fields: fields["links"]["node/p2p"].update(bandwidth=0.0),
            "links node/p2p must be a number > 0, got 0",
        ),
        (lambda fields: fields.update(copy_bandwidth=math.nan), "copy_bandwidth must be a number > 0, got nan"),
        (lambda fields: fields.update(merge_bandwidth=-1.0), "merge_bandwidth must be a number > 0, got -1"),
        (lambda fields: fields.update(gpus_per_node=0), "gpus_per_node must be an integer >= 1, got 0"),
        (lambda fields: fields.update(rates=fields["rates"][:1]), "kernels of both directions"),
        (lambda fields: fields["rates"][0].update(flops=math.inf), r"rates\[0\].flops must be a number > 0, got inf"),
    ],
)
def test_a_machine_that_plans_would_fail_on_is_refused(change: Any, words: str) -> None:
    fields = json.loads(H200.to_json())
    change(fields)
    with pytest.raises(ValueError, match=words):
        Machine.from_json(json.dumps(fields))


def test_shipped_machines_are_found_by_name() -> None:
    names = {"NVIDIA H200": "H200", "NVIDIA H100 80GB HBM3": "H100", "NVIDIA A100-SXM4-80GB": "A100", "cpu": "CPU"}
    assert {device: shipped(device).name for device in names} == names


def test_a_transfer_takes_latency_and_bandwidth() -> None:
    link = H200.links["network", "p2p"]
    assert transfer_seconds(H200, 0, "network", "p2p") == 0
    assert transfer_seconds(H200, link.bandwidth, "network", "p2p") == pytest.approx(1 + link.latency)
    assert [H200.link_class(7, other) for other in (0, 7, 8, 15)] == ["node", "node", "network", "network"]
