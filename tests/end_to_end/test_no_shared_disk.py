"""Two hosts that share no folder, but a store: the bits of a run on one host, whatever is killed and lost."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cnn2gnn_dist import cli, ledger
from cnn2gnn_dist.errors import PeerLost
from cnn2gnn_dist.runtime.group import members
from cnn2gnn_dist.training.checkpoint import folder as disk
from tests.support import host_runs, hosts, own_folders, runs
from tests.support.forks import Fork
from tests.support.hosts import Host, end_family
from tests.support.stored import record_files, s3_access, s3_bucket

folder, pair = hosts.fixtures()


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    with s3_bucket() as store:
        yield store


def finish(ranks: list[Fork], seconds: float = 400) -> list[tuple[int, str]]:
    """Exit code and output of each rank; none outlives this call."""
    try:
        return [runs.finish(rank, seconds) for rank in ranks]
    finally:
        for rank in ranks:
            end_family(rank)


def kill_when(ranks: list[Fork], true: Any) -> None:
    """SIGKILL all ranks at this moment of the run."""
    try:
        going = lambda: all(rank.poll() is None for rank in ranks)  # noqa: E731
        assert members.wait_until(lambda: true() or not going(), 400, 0.002)
        assert going(), [rank.communicate()[0][-4000:] for rank in ranks if rank.poll() is not None]
    finally:
        for rank in ranks:
            end_family(rank)


def arrays(run: Path) -> dict[str, bytes]:
    """Everything that was computed, by path: rows of graphs, their parts, targets, predictions."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for pattern in ("**/*.npy", "targets/**/*.parquet", "evaluation/*.npz")
        for path in sorted(run.glob(pattern))
    }


def stored_checkpoints(bucket: Any, url: str, stage: str) -> list[str]:
    names = record_files(bucket, url, stage)
    return sorted({name.split("/")[1] for name in names if name.startswith("checkpoints/step-")})


def test_a_run_killed_on_both_hosts_and_continued_on_empty_folders(
    bucket: Any, micro_run: Path, tmp_path: Path
) -> None:
    """Killed in the teacher (then b is empty), in the targets, in a refresh (then a is empty, and is rank 1),
    and in the student; the last start ends with the bits of a run that nobody disturbed on one folder.
    """
    url = "s3://runs/apart"
    a, b = tmp_path / "a", tmp_path / "b"
    stored = f"run.storage={url}"

    def has(stage: str, checkpoint: str) -> Any:
        """This checkpoint, or a later one: not every one is copied."""
        return lambda: max(stored_checkpoints(bucket, url, stage), default="") >= checkpoint

    kill_when(own_folders.start([a, b], stored), has("teacher", "step-00000008"))
    there = disk.all_of(disk.root_of(b / "run" / "teacher"))
    shares = [p.name for one in there for p in one.glob("rank-*.safetensors")]
    assert shares == ["rank-00001-of-00002.safetensors"] * len(there) != []
    shutil.rmtree(b)
    kill_when(own_folders.start([a, b], stored), lambda: any(b.glob("run/targets/*.parquet")))
    kill_when(
        own_folders.start([a, b], stored),
        lambda: any(a.glob("run/student/graph/*.tmp/*/*.done")),
    )
    shutil.rmtree(a)
    kill_when(own_folders.start([b, a], stored), has("student", "step-00000012"))

    found = finish(own_folders.start([a, b], stored))
    for code, output in found:
        assert code == 0, output[-6000:]
    said = found[0][1]
    assert (
        f"each host has a run.dir of its own: what one writes reaches the others through {url}"
        in said
    )
    assert "this folder was a copy of another host's" in said
    assert re.search(r"student +resumes at epoch", said)
    assert runs.trail(a / "run") == runs.trail(micro_run)
    assert runs.scores(a / "run") == runs.scores(micro_run)
    made, wanted = arrays(a / "run"), arrays(micro_run)
    assert made.keys() == wanted.keys()
    assert [name for name in made if made[name] != wanted[name]] == []
    other = arrays(b / "run")
    assert [n for n in other if n in wanted and other[n] != wanted[n]] == []
    assert len(other) > len(wanted) / 2
    assert bucket.find("runs/apart/exchange") == []
    _check_store(bucket, url, a, tmp_path)


def _check_store(bucket: Any, url: str, a: Path, tmp_path: Path) -> None:
    """The store has all of it: a third host continues alone, and a copy is not taken for the run.

    The third host's folder is a copy with a part of the last checkpoints: the trainings are complete all the same.
    """
    named = bucket.find("runs/apart/files")
    records = [
        record_files(bucket, url, p.split("/")[-1][:-5]) for p in bucket.find("runs/apart/records")
    ]
    assert len(named) == sum(map(len, records))  # nothing is left that no record names
    assert cli.main(["checkpoint", "verify", url]) == 0
    shutil.copytree(tmp_path / "b" / "run", tmp_path / "c")
    for stage in ("teacher", "student"):
        for share in disk.all_of(disk.root_of(tmp_path / "c" / stage))[-1].glob("rank-00000*"):
            share.unlink()
    code, output = runs.alone(*runs.launch(tmp_path / "c", f"run.storage={url}")[2:])
    assert code == 0, output[-4000:]
    assert output.count("complete, skipped") == 9
    assert runs.results(tmp_path / "c") == runs.results(a / "run")
    copy = tmp_path / "b" / "run"
    assert (copy / ledger.CONFIG).is_file()
    code, output = runs.alone(*runs.launch(copy)[2:])
    assert code == 2
    assert f"this folder is one host's copy of the run in {url}" in output


@hosts.needed()
def test_two_hosts_on_a_network_with_disks_of_their_own(
    pair: tuple[Host, ...], folder: Path, micro_run: Path
) -> None:
    """The store is on host a. Host b loses its rank in the student, and its disk."""
    own = folder / "own"
    own.mkdir()
    for host in pair:
        host.tmpfs(own, "512m")
    access = s3_access(f"http://{pair[0].address}:5000")
    moto = [sys.executable, "-m", "moto.server", "-H", pair[0].address, "-p", "5000"]
    server = pair[0].start(moto, runs.environment(), stdout=subprocess.DEVNULL)
    bucket = "import fsspec; fsspec.filesystem('s3').mkdir('runs')"
    command, env = [sys.executable, "-c", bucket], runs.environment(**access)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        assert members.wait_until(
            lambda: pair[1].run(command, env=env, **quiet).returncode == 0, 120
        )
        arguments = host_runs.micro(own / "run", "run.storage=s3://runs/pair")
        ranks = host_runs.start(pair, [*arguments, "cluster.timeout_s=20"], **access)
        saved = ["test", "-e", f"{own}/run/student/checkpoints/latest"]
        assert members.wait_until(
            lambda: pair[0].run(saved).returncode == 0 or ranks[0].poll() is not None, 400
        )
        end_family(ranks[1])
        [(code, output), _] = host_runs.finish(ranks)
        assert code == PeerLost.exit_code, output[-4000:]
        pair[1].shell(f"umount {own}")
        pair[1].tmpfs(own, "512m")
        again = host_runs.start(pair, arguments, port=29_503, **access)
        for code, output in host_runs.finish(again, 400):
            assert code == 0, output[-4000:]
        pair[0].shell(f"cp -r {own}/run {folder}/seen")
    finally:
        end_family(server)
    made = folder / "seen"
    assert runs.trail(made) == runs.trail(micro_run)
    assert runs.scores(made) == runs.scores(micro_run)
    assert arrays(made) == arrays(micro_run)


def test_twice_the_ranks_on_another_set_of_hosts(bucket: Any, tmp_path: Path) -> None:
    """Two ranks are killed in the teacher; four on three hosts, the first of which is new, end with the bits of
    four on one host that continue from the same state.
    """
    a, b, c = (tmp_path / name for name in "abc")
    url, chosen = "s3://runs/ranks", ["--stages", "pack,index,teacher,targets"]
    teacher = lambda: stored_checkpoints(bucket, url, "teacher")  # noqa: E731
    kill_when(own_folders.start([a, b], f"run.storage={url}", *chosen), teacher)
    bucket.copy("runs/ranks/", "runs/reference/", recursive=True)
    command = runs.launch(tmp_path / "one", "run.storage=s3://runs/reference", *chosen, ranks=4)
    code, output = runs.finish(runs.start(command, runs.environment()))
    assert code == 0, output[-4000:]
    assert re.search(r"teacher +resumes at epoch", output)
    for code, output in finish(own_folders.start([c, c, a, b], f"run.storage={url}", *chosen)):
        assert code == 0, output[-6000:]
    assert runs.trail(c / "run", ("teacher",)) == runs.trail(tmp_path / "one", ("teacher",))
    assert arrays(c / "run") == arrays(tmp_path / "one")
    assert [path.name for path in (c / "run").glob("targets/*.parquet")]


@pytest.mark.parametrize(
    ("folders", "storage", "said"),
    [
        ("ab", False, "rank 1 on a host 1: this folder is missing"),
        ("aab", True, "rank 2 on a host 2: this folder is not the one that rank 0 sees"),
        ("abb", True, "this folder is shared with rank 2 on a host 2, but not with all hosts"),
    ],
)
def test_hosts_that_share_a_folder_in_part_or_have_no_store(
    bucket: Any, tmp_path: Path, folders: str, storage: bool, said: str
) -> None:
    names = [f"a host {rank}" for rank in range(len(folders))]
    stored = ["run.storage=s3://runs/in-part"] if storage else []
    paths = [tmp_path / name for name in folders]
    found = finish(own_folders.start(paths, *stored, names=names))
    assert [code for code, _ in found] == [2] * len(folders), found
    assert said in found[0][1]
    assert ("run.storage=s3://BUCKET/FOLDER" in found[0][1]) == (not storage)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name[0] != "."]


def test_distdgl_is_refused(bucket: Any, tmp_path: Path) -> None:
    served = ["graph.sampling.sampler=distdgl", "graph.sampling.query=table"]
    paths = [tmp_path / "a", tmp_path / "b"]
    found = finish(own_folders.start(paths, "run.storage=s3://runs/served", *served))
    assert [code for code, _ in found] == [2, 2]
    assert "DGL's servers read what other hosts have written" in found[0][1]
    assert "each host has one of its own" in found[0][1]
