"""Two hosts, the ring across them and ulysses inside: a link that is slow and lossy, a host that is lost, a cut link.

Each host is a network namespace with an interface and a loopback of its own, see `hosts.py`.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests.launch.hosts import ADDRESSES, OVER_THE_LINK, Hosts, unavailable
from tests.training.forked import ROOT
from tests.training.test_runs import SMALL, assert_same_curve, curve, environment, run, wait_for_step

why = unavailable()
pytestmark = pytest.mark.skipif(why is not None, reason=str(why))

LIMIT = 240  # seconds after which a run hangs, on a busy machine
GONE_WITHIN = 60  # seconds in which the other host must end when one is gone: its connections close
HANG_AFTER = 15  # seconds that nothing may move
CUT_WITHIN = HANG_AFTER + 60  # and in which a run over a cut link must end on both hosts
RATES = [pytest.param("100mbit", marks=pytest.mark.nightly), pytest.param("", marks=pytest.mark.nightly)]
NOTICES_HANGS = "hang_after:" in (ROOT / "configs" / "run" / "default.yaml").read_text(encoding="utf-8")


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with Hosts() as both:
        yield both


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float, float]]:
    """The curve of one host with the same four ranks."""
    output = tmp_path_factory.mktemp("one-host")
    run(output, 4, "parallel.ulysses=2")
    return curve(output)


class Both:
    """`ringattn train` on both hosts, two ranks each."""

    def __init__(self, hosts: Hosts, output: Path, *overrides: str) -> None:
        output.mkdir(exist_ok=True)
        self.began, self.output = time.monotonic(), output
        hang = (f"run.hang_after={HANG_AFTER}",) if NOTICES_HANGS else ()
        self.logs = [output.with_name(f"host{number}-{time.monotonic_ns()}.log") for number in range(2)]
        self.hosts = []
        for number, log in enumerate(self.logs):
            where = ["--nodes", "2", "--node-rank", str(number), "--endpoint", f"{ADDRESSES[0]}:29500", "--nproc", "2"]
            recipe = [*SMALL, f"run.output={output}", "parallel.ulysses=2", *hang, *overrides]
            command = [sys.executable, "-m", "ringattn", "train", *where, *recipe]
            self.hosts.append(hosts.start(number, command, environment() | OVER_THE_LINK, ROOT, log))

    def end(self, within: float, *numbers: int) -> list[int]:
        """Exit codes of these hosts, both if none are named; fails if they take longer."""
        deadline = time.monotonic() + within
        try:
            return [self.hosts[number].wait(deadline - time.monotonic()) for number in numbers or (0, 1)]
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {within:.0f} s:\n{self.text()}")

    def text(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')}" for log in self.logs)


def tell(what: str, since: float) -> None:
    print(f"{what}: {time.monotonic() - since:.1f} s", file=sys.__stderr__, flush=True)


@pytest.mark.parametrize("rate", RATES, ids=["bad", "good"])
def test_two_hosts_train_the_curve_of_one(hosts, rate, reference, tmp_path):
    link = hosts.disturb(rate) if rate else "good"
    both = Both(hosts, tmp_path / "run")
    assert both.end(LIMIT) == [0, 0], both.text()
    tell(f"30 steps over a link ({link}) that lost {hosts.lost()} packets", both.began)
    assert (hosts.lost() > 0) == bool(rate)
    assert_same_curve(curve(both.output), reference)


@pytest.mark.nightly
def test_a_host_that_is_lost_and_a_link_that_is_cut_end_the_run_and_cost_nothing(hosts, reference, tmp_path):
    """A host loses its power, comes back, and then the link is gone: the same command goes on each time."""
    output = tmp_path / "run"
    both = Both(hosts, output, "run.save_every=4")
    wait_for_step(output, 9)
    lost = time.monotonic()
    hosts.kill(1)
    codes = both.end(GONE_WITHIN, 0)
    tell("a host was killed, and the other one ended after", lost)
    assert codes != [0], both.text()
    assert hosts.processes(0) == [], "ranks outlive their launcher"
    assert re.search(r"PeerFailed|killed|gone", both.text()), both.text()

    both = Both(hosts, output, "run.save_every=4")
    if NOTICES_HANGS:
        wait_for_step(output, 18)
        cut = time.monotonic()
        hosts.cut()
        codes = both.end(CUT_WITHIN)
        tell("the link was cut, and both hosts had ended after", cut)
        assert 0 not in codes, both.text()
        assert hosts.processes(0) == hosts.processes(1) == []
        ending = json.loads((output / "exit.json").read_text())
        assert (ending["state"], ending["restart"]) == ("failed", True)
        hosts.join()
        both = Both(hosts, output, "run.save_every=4")
    assert both.end(LIMIT) == [0, 0], both.text()
    assert "from step" in both.text()
    assert_same_curve(curve(output), reference)


@pytest.mark.nightly
@pytest.mark.xfail(not NOTICES_HANGS, reason="torchrun --standalone listens on all interfaces", strict=True)
def test_a_run_of_one_node_listens_on_the_loopback_alone(hosts, tmp_path):
    """Looked at while it trains, when everything that listens does so. The namespace has nobody else's sockets."""
    output, log = tmp_path / "run", tmp_path / "log"
    recipe = [*SMALL, f"run.output={output}", "run.steps=2000", "run.save_every=0"]
    hosts.start(0, [sys.executable, "-m", "ringattn", "train", "--nproc", "2", *recipe], environment(), ROOT, log)
    wait_for_step(output, 1)
    listening = [line.split()[3] for line in hosts.output(0, "ss", "-Hltn").splitlines()]
    elsewhere = [place for place in listening if not re.match(r"(127\.|\[::1\]|\[::ffff:127\.)", place)]
    assert not elsewhere, f"{listening} in\n{log.read_text()}"


@pytest.mark.nightly
def test_preflight_finds_the_slow_link(hosts, tmp_path):
    """40 Mbit/s is 0.1 % of what a CPU's links are taken to be; the other checks are as on one host."""
    hosts.disturb("40mbit")
    output, logs = tmp_path / "out", [tmp_path / f"log{number}" for number in range(2)]
    command = [sys.executable, "-m", "ringattn", "preflight", "--nodes", "2", "--endpoint", f"{ADDRESSES[0]}:29600"]
    command += ["--device", "cpu", "--machine", "CPU", "--slow", "1", "--free", "1", "--output", str(output)]
    began = time.monotonic()
    nodes = [
        hosts.start(number, [*command, "--node-rank", str(number)], environment() | OVER_THE_LINK, ROOT, log)
        for number, log in enumerate(logs)
    ]
    codes, page = [node.wait(LIMIT) for node in nodes], logs[0].read_text()
    tell("preflight of two hosts", began)
    assert codes == [1, 1], page
    wrong = page.partition("\nWrong\n")[2]
    assert re.search(r"- between node 0 \(\S+\) and node 1 \(\S+\), devices 0 and 0: .* MB/s, expected 4 GB/s", wrong)
    assert "inside" not in wrong, page
