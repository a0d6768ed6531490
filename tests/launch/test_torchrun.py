"""`launch/torchrun.sh`: one agent a node, by arguments or by the environment, and with the real
`ringattn train` and torchrun."""

import socket
import subprocess

import pytest

from tests.launch.checkout import PYTHON, ROOT, Checkout


def test_torchrun_by_arguments_and_by_environment(checkout: Checkout) -> None:
    arguments = ["--nodes", "2", "--node-rank", "1", "--endpoint", "a:29400", "--nproc-per-node", "4", "--id", "x"]
    done = checkout.run("launch/torchrun.sh", *arguments, "parallel.ring=2", SATISFIED="0")
    assert done.returncode == 0, done.stderr
    assert checkout.calls == [f"train {' '.join(arguments)} parallel.ring=2"]
    variables = {"NNODES": "2", "NODE_RANK": "1", "ENDPOINT": "a:29400", "JOB_ID": "x"}
    done = checkout.run("launch/torchrun.sh", "parallel.ring=2", SATISFIED="0", **variables)
    assert done.returncode == 0, done.stderr
    assert checkout.calls == ["train parallel.ring=2"]
    assert checkout.machines[-1] == "NNODES=2 NODE_RANK=1 ENDPOINT=a:29400 JOB_ID=x"
    assert checkout.run("launch/torchrun.sh", "--nodes=2", SATISFIED="0").returncode == 0


@pytest.mark.parametrize("arguments", [(), ("--node-rank", "0"), ("--nodse", "2"), ("parallel.ring=2",)])
def test_torchrun_without_a_number_of_nodes_is_refused(checkout: Checkout, arguments: tuple[str, ...]) -> None:
    done = checkout.run("launch/torchrun.sh", *arguments, SATISFIED="0")
    assert done.returncode == 2
    assert done.stderr.startswith("torchrun.sh: missing: --nodes (or NNODES)\nusage: bash launch/torchrun.sh")
    assert checkout.calls == []


@pytest.mark.slow
def test_two_agents_on_one_machine_meet(checkout: Checkout) -> None:
    """Two nodes of two ranks: every rank knows its place, node by node."""
    (checkout.root / "recipes").mkdir()
    (checkout.root / "recipes/train.py").write_text(
        "import os, runpy, sys\n"
        "printed = '--cfg' in sys.argv\n"
        f"printed and runpy.run_path('{ROOT}/recipes/train.py', run_name='__main__')\n"
        "names = ['RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'GROUP_RANK']\n"
        "line = ' '.join(['place', *(os.environ.get(n, '') for n in names), *sys.argv[1:]])\n"
        "printed or os.write(1, f'{line}\\n'.encode())  # in one piece: the ranks share a pipe\n"
    )
    for name in ("ringattn", "configs"):
        (checkout.root / name).symlink_to(ROOT / name)
    checkout.program("python3", PYTHON.replace('"-m ringattn train"*', '"never"'))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    environment = checkout.environment(SATISFIED="0", NNODES="2", NPROC="2", ENDPOINT=endpoint, OMP_NUM_THREADS="1")
    agents = [
        subprocess.Popen(
            ["bash", "launch/torchrun.sh", "--node-rank", str(rank), "run.steps=1"],
            cwd=checkout.root,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (1, 0)
    ]
    try:
        text = "".join(agent.communicate(timeout=100)[0] for agent in agents)
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0]
    places = sorted(line.split()[1:] for line in text.splitlines() if line.startswith("place"))
    assert places == [[str(r), "4", str(r % 2), "2", str(r // 2), "run.steps=1"] for r in range(4)]
