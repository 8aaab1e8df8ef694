"""The commands in README and docs could run: their files, options and fields exist."""

from __future__ import annotations

import sys

import pytest

from tests.support import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import docs_commands

FOUND = docs_commands.commands()


@pytest.mark.parametrize("command", FOUND, ids=lambda one: f"{one.place} {one.text}")
def test_a_command_of_the_docs_could_run(command):
    assert docs_commands.fault(command) == ""


def test_the_docs_have_commands_of_every_program_and_no_pattern_is_stale():
    assert len(FOUND) > 30
    begun = {one.text.split()[0] for one in FOUND}
    assert {"cnn2gnn", "make", "pip", "torchrun", "deepspeed", "python", "ray"} <= begun
    assert docs_commands.stale_patterns(FOUND) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("cnn2gnn run --config demo student.epoch=3", "student.epochs"),
        ("cnn2gnn run --config nothing", "no config file or preset"),
        ("cnn2gnn checkpoint list runs/demo", "invalid choice"),
        ("cnn2gnn run --dryrun", "--dryrun"),
        ("torchrun --nproc_per_node 2 launch/trein.py --config demo", "no file launch/trein.py"),
        (
            "torchrun --nproc_per_node 2 launch/train.py --config demo graph.sampling.fanouts=[1,1]",
            "2 candidates",
        ),
        (
            "torchrun --nproc_per_node 4 launch/train.py --config demo",
            "2 partitions can't be shared by 4",
        ),
        (
            "torchrun --nnodes 2 --nproc_per_node 2 -m cnn2gnn_dist.launcher --config demo",
            "by 4 ranks",
        ),
        (
            "deepspeed --num_gpus 3 launch/train.py --config demo teacher.global_batch=96",
            "over 3 ranks",
        ),
        (
            "deepspeed --hostfile cluster/hostfile launch/train.py --config imagenet",
            "8 partitions can't",
        ),
        ("cnn2gnn run --config imagenet run.ranks=16", "8 partitions can't be shared by 16"),
        ("cnn2gnn student --config demo run.ranks=4", "2 partitions can't be shared by 4"),
        ("python benchmarks/scale.py FOLDER --noodles 3", "no --noodles"),
        ("pip install -r benchmarks/none.txt", "no file"),
        ("pip install 'cnn2gnn-dist[remote]'", "on no index"),
        ("pip install '.[none]'", "no extra none"),
        ("make demos", "no demos"),
    ],
)
def test_a_command_that_could_not_run_is_found(text, fault):
    assert fault in docs_commands.fault(docs_commands.Command("x", text, "short", ""))


def test_what_is_compared_with_installs_from_wheels_or_says_how_to_build_it():
    """Nothing in requirements.txt has to be compiled; what must be is installed without build isolation."""
    folder = REPOSITORY / "benchmarks"
    built = ("hnswlib", "torch-scatter", "torch-sparse")
    plain = (folder / "requirements.txt").read_text()
    lines = [line for line in plain.splitlines() if not line.startswith("#")]
    assert not any(line.startswith(built) for line in lines)
    assert all("==" in line for line in lines)
    how = (folder / "requirements-build.txt").read_text()
    assert "--no-build-isolation" in how
    assert all(f"\n{name}==" in how for name in built)
