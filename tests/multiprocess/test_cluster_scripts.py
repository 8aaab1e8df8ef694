"""What the scripts of cluster/ ask of Slurm, with stand-ins for its commands (a real one: test_slurm.py)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support import REPOSITORY

STANDINS = {
    "srun": 'printf "%s\\n" "$@" > "$NOTED"; exit 3',
    "scontrol": "echo node-a",
    "sleep": "exit 0",
}


def asked(folder: Path, script: str, **variables: str) -> tuple[int, list[str]]:
    """Exit code of a script of cluster/, and the arguments of its srun."""
    for name, text in STANDINS.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    (folder / "env" / "bin").mkdir(parents=True, exist_ok=True)
    (folder / "env" / "bin" / "activate").touch()
    text = (REPOSITORY / "cluster" / script).read_text()
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
