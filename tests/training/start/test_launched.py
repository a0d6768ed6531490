"""torchrun, srun or alone, from their variables."""

import pytest

from ringattn.training.start.launched import detect, export, first_host, is_first

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "host0",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_JOB_ID": "1234567",
}


def test_torchrun_comes_first_also_under_slurm():
    launch = detect(SLURM | TORCHRUN)
    assert (launch.kind, launch.rank, launch.world_size, launch.local_rank, launch.ranks_per_node) == (
        "torchrun", 5, 8, 1, 4,
    )  # fmt: skip


def test_tasks_of_srun_know_their_place():
    launch = detect(SLURM)
    assert (launch.kind, launch.rank, launch.world_size, launch.local_rank, launch.ranks_per_node) == (
        "slurm", 9, 16, 1, 8,
    )  # fmt: skip
    assert launch.master_addr == "gpu003"
    assert 20_000 <= launch.master_port < 40_000
    assert detect(SLURM | {"SLURM_PROCID": "0"}).master_port == launch.master_port


def test_an_sbatch_script_without_srun_is_alone():
    launch = detect({"SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"})
    assert (launch.kind, launch.world_size) == ("single", 1)


def test_export_gives_what_init_process_group_reads():
    environ: dict[str, str] = {}
    export(detect(SLURM), environ)
    assert environ["RANK"] == "9"
    assert environ["WORLD_SIZE"] == "16"
    assert detect(environ).rank == 9
    assert detect(environ).ranks_here == range(8, 16)


def test_variables_that_are_missing_or_differ_are_named():
    with pytest.raises(ValueError, match="MASTER_ADDR, MASTER_PORT"):
        detect({"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match=r"8\(x3\),4"):
        detect(SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8(x3),4"})


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("gpu[003-008,012],login", "gpu003"), ("a,b", "a"), ("node7", "node7"), ("r[1,4]n-x", "r1n-x")],
)
def test_the_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


def test_only_the_first_rank_speaks():
    assert is_first({})
    assert is_first(TORCHRUN | {"RANK": "0"})
    assert not is_first(TORCHRUN)
    assert not is_first(SLURM)
