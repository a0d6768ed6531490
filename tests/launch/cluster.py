"""A SLURM cluster of this one machine: the real munged, slurmctld and slurmd, with their files in one folder.

Debian: `apt install slurm-wlm munge`, and be root. Two partitions of the same node: jobs of `high` preempt those of
`low`, which are told and have GRACE seconds to end.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
GRACE = 60
CONF = """\
ClusterName=ringattn
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A job that is requeued waits until its credentials have expired: two minutes by default.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=100000
KillWait=60
OverTimeLimit=5
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=low Nodes={host} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes={host} PriorityTier=10 PreemptMode=OFF
"""


def unavailable() -> str | None:
    """Why there can be no cluster here, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"{', '.join(absent)} not installed (apt install slurm-wlm munge)"
    return "munged and slurmd are started as root" if os.geteuid() != 0 else None


class Cluster:
    """Use as a context manager: the daemons end with it, and the jobs with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = socket.gethostname().partition(".")[0]
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}

    def __enter__(self) -> "Cluster":
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        ports = {"controller": _free_port(), "daemon": _free_port()}
        settings = {"host": self.host, "folder": self.folder, "cores": os.cpu_count(), "grace": GRACE}
        (self.folder / "slurm.conf").write_text(CONF.format(**settings, **ports))
        self.folder.chmod(0o755)  # munge will not have its socket where others could not reach it
        key, files = (
            f"{self.folder}/munge.key",
            {"socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"},
        )
        self.call("mungekey", "--create", f"--keyfile={key}")
        places = [f"--{option}={self.folder}/munge.{name}" for option, name in files.items()]
        try:
            self.call("munged", "--force", f"--key-file={key}", *places)
            self.call("slurmctld", "-c")
            self.call("slurmd", "-c")
            self.wait_for(lambda: "idle" in self.call("sinfo", "-h", "-o", "%T"), 30, "the node is not ready")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["scancel", "--user=root"], env=self.environment, capture_output=True)
        for _ in range(30):  # jobs outlive a slurmd that ends before them
            left = subprocess.run(["squeue", "-h"], env=self.environment, capture_output=True, text=True)
            if not left.stdout:
                break
            time.sleep(1)
        for name in ("slurmd", "slurmctld", "munge"):
            with suppress(OSError, ValueError):
                pid = int((self.folder / f"{name}.pid").read_text())
                os.kill(pid, signal.SIGTERM)
                self.wait_for(lambda: not Path(f"/proc/{pid}").exists(), 20, f"{name} does not end")  # noqa: B023

    def call(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, folder: Path, log: Path, *arguments: str, **variables: str) -> str:
        """The number of a job, submitted from a folder with more variables in its environment."""
        command = ["sbatch", "--parsable", f"--output={log}", *arguments]
        done = subprocess.run(
            command, cwd=folder, env=self.environment | variables, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM says of a job."""
        words = self.call("scontrol", "show", "job", "-o", number).split()
        return dict(word.partition("=")[::2] for word in words)

    def wait_for(self, condition, seconds: float, otherwise: str, log: Path | None = None) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            told = log.read_text() if log is not None and log.exists() else ""
            assert time.monotonic() < deadline, f"{otherwise} within {seconds:.0f} s\n{told}"
            time.sleep(0.2)


def _path() -> str:
    """Debian has daemons where a user's path does not."""
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
