"""cluster/slurm.sbatch and cluster/slurm-ray.sbatch on a real Slurm of two hosts."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cnn2gnn_dist.runtime.group import members
from tests.support import REPOSITORY, hosts, short_folder, slurm
from tests.support.runs import MICRO, finish

pytestmark = hosts.needed(*slurm.PROGRAMS)

NODES = "--nodes=2 --ntasks-per-node=1 --time=10"
TEACHER = [*MICRO, "device=cpu", "cluster.timeout_s=60"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm.Slurm]:
    with (
        short_folder() as folder,
        hosts.network(2, keep=[folder]) as two,
        slurm.started(folder, two) as started,
    ):
        yield started


def three_lines(name: str, cluster: slurm.Slurm, **third: str) -> tuple[Path, Path]:
    """A script of cluster/ with its three lines changed as a user would, and its run folder."""
    run = cluster.folder / f"run-{len(list(cluster.folder.glob('*.sbatch')))}"
    lines = {
        "1": f"#SBATCH {NODES}",
        "2": f"environment={sys.prefix}",
        "3": " ".join(f"{k}={v}" for k, v in {"config": "demo", "run_dir": run, **third}.items()),
    }
    text = (REPOSITORY / "cluster" / name).read_text()
    text, changed = re.subn(r"^.* # (\d): your .*$", lambda line: lines[line[1]], text, flags=re.M)
    assert changed == 3
    script = cluster.folder / f"{run.name}.sbatch"
    script.write_text(text)
    return script, run


def steps(run: Path) -> list[int]:
    """Steps in the teacher's metrics so far."""
    file = run / "teacher" / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line)["step"] for line in lines if '"step"' in line]


def wait_for_step(cluster: slurm.Slurm, job: str, run: Path, step: int) -> None:
    deadline = time.monotonic() + 500  # generous for a loaded machine
    while max(steps(run), default=0) < step:
        assert time.monotonic() < deadline, cluster.output(job)[-3000:]
        time.sleep(0.1)


def test_a_task_of_an_array_is_signalled_requeued_and_goes_on(cluster):
    script, run = three_lines("slurm.sbatch", cluster)
    run = run.with_name(f"{run.name}-3")
    arguments = [*TEACHER, "teacher.epochs=16", "--stages=pack,index,teacher"]
    job = cluster.submit(script, *arguments, options=["--array=3"])
    wait_for_step(cluster, job, run, 5)
    cluster.ask("scancel", "--signal=TERM", job)  # what --signal=TERM@120 sends: to the ranks alone
    found = cluster.wait(f"{job}_3")
    output = cluster.output(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), output[-3000:]
    assert "srun ended with 143" in output
    saved = int(re.search(r"step (\d+) is saved", output)[1])
    assert 5 <= saved < 144
    assert f"step {saved}" in output.split("attempt 1")[1]
    assert steps(run)[-1] == 144
    assert json.loads((run / "teacher" / "done.json").read_text())
    assert yaml.safe_load((run / "config.yaml").read_text())["seed"] == 3


def test_the_doctor_asks_every_host_and_names_the_one_whose_folder_is_another(cluster):
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=0", sys.executable]
    command += ["-m", "cnn2gnn_dist", "doctor", "--cluster", "--folder", "/tmp/home"]
    code, output = finish(cluster.hosts[0].start(command, cluster.environment))
    assert code == 1
    for host, shared in zip(cluster.hosts, ("yes", "no"), strict=True):
        (line,) = [one for one in output.splitlines() if one.startswith(host.name)]
        assert line.split()[1:3] == [host.address, "eth0"]
        assert f" {shared} " in line
    assert "FAIL  node-b: /tmp/home is another folder than on the first node" in output
    assert "-> storage that all nodes mount at this path" in output
    assert "\n2 nodes, " in output


def test_ray_has_time_to_save_and_keeps_the_exit_code(cluster):
    script, run = three_lines("slurm-ray.sbatch", cluster, ranks="2")
    job = cluster.submit(script, *TEACHER, "teacher.epochs=2000", MOST_REQUEUES="0")
    wait_for_step(cluster, job, run, 5)
    cluster.ask("scancel", "--signal=TERM", "--batch", job)  # what --signal=B:TERM@120 sends
    found = cluster.wait(job)
    output = cluster.output(job)
    assert (found["JobState"], found["ExitCode"]) == ("FAILED", "143:0"), output[-3000:]
    saved = int(re.search(r"step (\d+) is saved", output)[1])
    assert (run / "teacher/checkpoints/latest").read_text() == f"step-{saved:08d}"
    running = lambda: [host.shell("ps -eo comm") for host in cluster.hosts]  # noqa: E731
    assert members.wait_until(lambda: not any("raylet" in one for one in running()), 60), running()
