"""What the scripts of cluster/ ask of Slurm, with stand-ins for its commands (a real one: test_slurm.py)."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from cnn2gnn_dist import settings
from tests.support import REPOSITORY

STANDINS = {
    "srun": 'printf "%s\\n" "$@" > "$NOTED"; exit 3',
    "scontrol": "echo node-a",
    "sleep": "exit 0",
}


def asked(
    folder: Path, script: str, text: str | None = None, **variables: str
) -> tuple[int, list[str]]:
    """Exit code of a script of cluster/, or of a changed one, and the arguments of its srun."""
    for name, answer in STANDINS.items():
        (folder / name).write_text(f"#!/bin/sh\n{answer}\n")
        (folder / name).chmod(0o755)
    (folder / "env" / "bin").mkdir(parents=True, exist_ok=True)
    (folder / "env" / "bin" / "activate").touch()
    text = text or (REPOSITORY / "cluster" / script).read_text()
    (folder / script).write_text(text.replace("/shared/cnn2gnn-dist/.venv", str(folder / "env")))
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node-[a-b]"}
    environment = slurm | variables | {"NOTED": str(folder / "noted")}
    environment["PATH"] = f"{folder}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(folder / script), "seed=3"], cwd=folder, env=environment, timeout=60
    )
    return done.returncode, (folder / "noted").read_text().splitlines()


@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm-ray.sbatch"])
def test_srun_is_told_the_cores_of_a_task(tmp_path: Path, script: str) -> None:
    """From version 22.05 on it doesn't take them from the job's variable."""
    code, arguments = asked(tmp_path, script, SLURM_CPUS_PER_TASK="8")
    assert code == 3
    assert arguments[:2] == ["--kill-on-bad-exit=0", "--cpus-per-task=8"]
    assert arguments[2] in ("python", "ray")
    assert arguments[-1] == "seed=3"
    _, arguments = asked(tmp_path, script)
    assert arguments[0] == "--kill-on-bad-exit=0"
    assert arguments[1] in ("python", "ray")


@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm-ray.sbatch"])
def test_the_run_has_a_partition_for_every_gpu(tmp_path: Path, script: str) -> None:
    """With fewer than ranks it would be refused on every node, after the job has waited for them."""
    asking = (REPOSITORY / "cluster" / script).read_text()
    nodes, gpus = (
        int(re.findall(rf"--{name}=(\d+)", asking)[0]) for name in ("nodes", "gpus-per-node")
    )
    _, arguments = asked(tmp_path, script)
    overrides = [one for one in arguments if re.match(r"[a-z_.]+=", one)]
    config = settings.load(arguments[arguments.index("--config") + 1], overrides)
    assert config.graph.partition.parts >= nodes * gpus == 16
    assert config.seed == 3
    if script == "slurm-ray.sbatch":
        assert config.run.ranks == nodes * gpus


@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm-ray.sbatch"])
def test_partitions_may_be_left_to_the_config(tmp_path: Path, script: str) -> None:
    original = (REPOSITORY / "cluster" / script).read_text()
    changed = re.sub(r" parts=\d+", "", original)
    assert changed != original
    _, arguments = asked(tmp_path, script, changed)
    assert not any("graph.partition.parts" in one for one in arguments)
