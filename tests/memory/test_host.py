"""What the host has to give, by the files in which the kernel says so."""

from pathlib import Path

from ringattn.memory.host import host_memory


def test_the_machine_and_its_container(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:  600 kB\n")
    assert (host_memory(tmp_path).total, host_memory(tmp_path).available) == (1_024_000, 614_400)
    cgroup = tmp_path / "sys/fs/cgroup"
    cgroup.mkdir(parents=True)
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "memory.current").write_text("100000\n")
    assert host_memory(tmp_path).available == 614_400
    (cgroup / "memory.max").write_text("500000\n")
    assert (host_memory(tmp_path).total, host_memory(tmp_path).available) == (500_000, 400_000)


def test_where_nothing_is_said(tmp_path: Path) -> None:
    found = host_memory(tmp_path)
    assert (found.total, found.available) == (None, None)
    assert str(found).startswith("unknown of unknown host memory are available; at most ")


def test_this_machine_has_some() -> None:
    found = host_memory()
    assert found.total is None or (found.available is not None and 0 < found.available <= found.total)
