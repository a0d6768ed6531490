"""`launch/torchrun.sh`: one agent a node, by arguments or by the environment, and with the real torchrun."""

import socket
import subprocess

import pytest

from tests.launch.checkout import PYTHON, Checkout


def test_torchrun_by_arguments_and_by_environment(checkout: Checkout) -> None:
    arguments = ["--nodes", "2", "--node-rank", "1", "--endpoint", "a:29400", "--nproc-per-node", "4", "--id", "x"]
    done = checkout.run("launch/torchrun.sh", *arguments, "mesh.ring=2", SATISFIED="0")
    assert done.returncode == 0, done.stderr
    by_arguments = checkout.calls
    variables = {"NNODES": "2", "NODE_RANK": "1", "ENDPOINT": "a:29400", "NPROC": "4", "JOB_ID": "x"}
    checkout.run("launch/torchrun.sh", "mesh.ring=2", SATISFIED="0", **variables)
    assert checkout.calls == by_arguments
    assert by_arguments[0].startswith(
        "torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint a:29400 --rdzv-id x "
        "--rdzv-conf is_host=false recipes/train.py mesh.ring=2"
    )
    checkout.run("launch/torchrun.sh", "--node-rank", "0", SATISFIED="0", **variables)
    assert "is_host=true" in checkout.calls[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "missing: --nodes (or NNODES) --node-rank (or NODE_RANK) --endpoint (or ENDPOINT)"),
        ("--nodes 2 --endpoint a:1", "missing: --node-rank (or NODE_RANK)"),
        ("--nodes two --node-rank 0 --endpoint a:1", "--nodes must be an integer >= 1, got 'two'"),
        ("--nodes 2 --node-rank 2 --endpoint a:1", "must be an integer from 0 to 1 for --nodes 2, got '2'"),
        ("--nodes 2 --node-rank 0 --endpoint a", "--endpoint must be HOST:PORT, got 'a'"),
        ("--nodes 2 --node-rank", "--node-rank needs a value"),
        ("--nodse 2", "unknown option --nodse"),
    ],
)
def test_torchrun_refusals(checkout: Checkout, arguments: str, message: str) -> None:
    done = checkout.run("launch/torchrun.sh", *arguments.split(), SATISFIED="0")
    assert done.returncode == 2
    assert message in done.stderr
    assert "usage: bash launch/torchrun.sh" in done.stderr
    assert checkout.calls == []


def test_two_agents_on_one_machine_meet(checkout: Checkout) -> None:
    """Two nodes of two ranks: every rank knows its place, node by node."""
    (checkout.root / "recipes").mkdir()
    (checkout.root / "recipes/train.py").write_text(
        "import os, sys\nnames = ['RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'GROUP_RANK']\n"
        "line = ' '.join(['place', *(os.environ[n] for n in names), *sys.argv[1:]])\n"
        "os.write(1, f'{line}\\n'.encode())  # in one piece: the ranks share a pipe\n"
    )
    checkout.program("python3", PYTHON.replace('"-m torch.distributed.run"*', '"never"'))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    environment = checkout.environment(SATISFIED="0", NNODES="2", NPROC="2", ENDPOINT=endpoint, OMP_NUM_THREADS="1")
    agents = [
        subprocess.Popen(
            ["bash", "launch/torchrun.sh", "--node-rank", str(rank), "a=1"],
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
    assert places == [[str(r), "4", str(r % 2), "2", str(r // 2), "a=1"] for r in range(4)]
