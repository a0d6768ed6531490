"""Nodes tell each other addresses, not names that may mean the loopback."""

import socket

import pytest

from ringattn.commands.train import local_address


@pytest.mark.parametrize("endpoint", ["127.0.0.1:29500", "localhost:29500", "[::1]:29500", "no.such.host.invalid:1"])
def test_the_loopback_and_unknown_hosts_are_left_to_torchrun(endpoint):
    assert local_address(endpoint) == []


def test_the_address_is_that_of_the_way_to_the_endpoint(monkeypatch):
    class Probe:
        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> "Probe":
            return self

        def __exit__(self, *_: object) -> None: ...
        def connect(self, address: object) -> None:
            assert address == ("10.1.2.3", 29500)

        def getsockname(self) -> tuple[str, int]:
            return "10.1.2.9", 40000

    monkeypatch.setattr(socket, "socket", Probe)
    assert local_address("10.1.2.3:29500") == ["--local-addr", "10.1.2.9"]
