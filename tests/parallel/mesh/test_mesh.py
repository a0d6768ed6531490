"""What moves the data of a mesh's axes, and the machine that its plans are made for."""

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from ringattn.parallel.machine.shipped import SHIPPED
from ringattn.parallel.mesh import mesh as module
from ringattn.parallel.mesh.mesh import SequenceMesh, init_mesh
from tests.pool import Pools

FAR = "its ranks are on 2 hosts"


@pytest.mark.parametrize(
    ("ring", "ulysses", "of_all", "of_ulysses", "engines"),
    [
        (2, 4, "", "", ("ring", "ulysses")),
        (2, 4, FAR, "", ("ulysses",)),
        (2, 4, FAR, FAR, ()),
        (8, 1, FAR, "", ()),
        (1, 8, "", "", ("ring", "ulysses")),
    ],
)
def test_plans_are_made_for_the_engines_of_each_axis(
    monkeypatch: pytest.MonkeyPatch, ring: int, ulysses: int, of_all: str, of_ulysses: str, engines: tuple[str, ...]
) -> None:
    """A ring over several hosts is not priced as if copy engines moved its keys, though they move the heads."""
    groups: dict[Any, str] = {"all": of_all, "ulysses": of_ulysses}
    monkeypatch.setattr(module, "why_not", lambda group: groups[group])
    monkeypatch.setattr(module, "_first_of_all", lambda reason, group: reason)
    connections = mock.Mock(group={"sequence": "all", "ulysses": "ulysses"}.__getitem__)
    mesh = SequenceMesh(1, ring, ulysses, machine=SHIPPED["H200"], device_type="cuda", connections=connections)
    found = module._with_transport(mesh, "auto")
    assert found.machine is not None
    assert found.machine.engines == engines
    assert ("" if "ring" in engines else FAR) == found.ring_reason
    copy = SHIPPED["H200"].links["node", "copy"]
    for axis, primitive in (("ring", "p2p"), ("ulysses", "all_to_all")):
        assert (found.machine.links["node", primitive] == copy) == (axis in engines)


def machines(path: str, captured: bool) -> list[Any]:
    with mock.patch.dict(os.environ, RINGATTN_MACHINE=path):
        mesh = init_mesh(data=1, sequence=2, device_type="cpu", captured=captured)
    return [one.machine for one in mesh.alternatives]


def test_meshes_for_captured_steps_are_planned_without_the_host(pool: Pools, tmp_path: Path) -> None:
    calibrated = tmp_path / "machine.json"
    calibrated.write_text(SHIPPED["H200"].to_json())
    for captured in (False, True):
        for found in pool(2).run(machines, str(calibrated), captured):
            assert len(found) == 2
            assert all((machine.host_pass == machine.host_call == 0) == captured for machine in found)
            assert all(machine.rates == SHIPPED["H200"].rates for machine in found)
