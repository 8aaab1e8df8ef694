"""A real Slurm on hosts that are namespaces (``tests.support.hosts``): Debian's daemons, ending with their hosts."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.support.hosts import Host
from tests.support.runs import environment

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
SECONDS = 240.0
CONFIG = """\
ClusterName=test
SlurmctldHost={first}({address})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=/tmp/munge/socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/linear
ReturnToService=2
StateSaveLocation=/tmp/slurm/state
SlurmdSpoolDir=/tmp/slurm/spool
SlurmctldPidFile=/tmp/slurm/slurmctld.pid
SlurmdPidFile=/tmp/slurm/slurmd.pid
SlurmctldLogFile=/tmp/slurm/slurmctld.log
SlurmdLogFile=/tmp/slurm/slurmd.log
JobRequeue=1
KillWait=5
MinJobAge=3600
SchedulerParameters=sched_interval=1,bf_interval=2
{nodes}
PartitionName=main Nodes=ALL Default=YES State=UP MaxTime=INFINITE
"""
DAEMON = """
mkdir -p /tmp/munge /tmp/slurm/state /tmp/slurm/spool
install -m 400 {key} /tmp/munge/key
munged --key-file=/tmp/munge/key --socket=/tmp/munge/socket --pid-file=/tmp/munge/pid \
    --log-file=/tmp/munge/log --seed-file=/tmp/munge/seed
export SLURM_CONF={config}
"""


class Slurm:
    """Jobs on a cluster whose controller is on the first host."""

    def __init__(self, folder: Path, hosts: Sequence[Host]) -> None:
        self.folder, self.hosts = folder, hosts
        self.environment = environment(SLURM_CONF=str(folder / "slurm.conf"), HOME="/tmp/home")

    def ask(self, *command: str, **more: str) -> str:
        """Output of a Slurm command on the first host, in ``folder``."""
        done = subprocess.run(
            self.hosts[0].enter(command, self.folder),
            env=self.environment | more,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def submit(
        self, script: Path, *arguments: str, options: Sequence[str] = (), **more: str
    ) -> str:
        """Submit a job; return its number."""
        return self.ask("sbatch", "--parsable", *options, str(script), *arguments, **more)

    def state(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, ExitCode, Restarts and others."""
        fields = self.ask("scontrol", "show", "job", "--oneliner", job).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait(self, job: str, *states: str, seconds: float = 500.0) -> dict[str, str]:
        """Wait for one of these states, or for another end of the job."""
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        deadline = time.monotonic() + seconds
        while (found := self.state(job))["JobState"] not in {*ends, *states}:
            assert time.monotonic() < deadline, f"{found}\n{self.output(job)[-3000:]}"
            time.sleep(0.5)
        return found

    def output(self, job: str) -> str:
        """What a job has printed."""
        file = self.folder / f"cnn2gnn-{job}.out"
        return file.read_text() if file.exists() else ""


@contextlib.contextmanager
def started(folder: Path, hosts: Sequence[Host]) -> Iterator[Slurm]:
    """Slurm on these hosts, with two tasks on each; they share ``folder``."""
    key, config = folder / "munge.key", folder / "slurm.conf"
    key.write_bytes(os.urandom(128))
    nodes = (f"NodeName={h.name} NodeAddr={h.address} CPUs=2 RealMemory=1000" for h in hosts)
    text = CONFIG.format(first=hosts[0].name, address=hosts[0].address, nodes="\n".join(nodes))
    config.write_text(text)
    for host in hosts:
        host.shell(DAEMON.format(key=key, config=config))
    hosts[0].shell(f"SLURM_CONF={config} slurmctld")
    for host in hosts:
        host.shell(f"SLURM_CONF={config} slurmd -N {host.name}")
    slurm = Slurm(folder, hosts)
    deadline = time.monotonic() + SECONDS
    idle = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
    command = hosts[0].enter(idle, folder)
    while True:
        done = subprocess.run(command, env=slurm.environment, capture_output=True, text=True)
        if done.stdout.strip() == str(len(hosts)):
            break
        assert time.monotonic() < deadline, done.stdout + done.stderr
        time.sleep(0.2)
    yield slurm
