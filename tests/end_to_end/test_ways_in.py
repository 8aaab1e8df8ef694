"""Three launchers, one code path: each gets the same result on the digits."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cnn2gnn_dist import cli
from tests.support import short_folder
from tests.support.ports import free_port
from tests.support.runs import (
    BIN,
    MICRO,
    bare_environment,
    environment,
    finish,
    results,
    scores,
    start,
)


def test_torchrun_leaves_every_artefact(micro_run):
    table = results(micro_run)
    for model in ("teacher", "student", "control_mlp"):
        assert table[model].keys() >= {"accuracy", "parameters", "flops", "ms_per_image", "ece"}
        assert 0.1 < table[model]["accuracy"] <= 1.0
    assert table["student"]["parameters"] > table["control_mlp"]["parameters"]
    targets = sorted((micro_run / "targets").glob("*.parquet"))
    assert len(targets) == len(list((micro_run / "shards").glob("train-*.tar")))
    graph = table["student"]["graph"]
    assert sum(graph["inner"]) == graph["nodes"] == table["run"]["train_images"]
    assert len(graph["inner"]) == len(graph["halo"]) == 2


def test_deepspeed_launcher(micro_run, tmp_path):
    command = [str(BIN / "deepspeed"), "--hostfile", "cluster/hostfile", "--no_ssh"]
    command += [
        "--node_rank",
        "0",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        str(free_port()),
        "launch/train.py",
    ]
    command += ["--deepspeed_config", "ds_config.json", "--config", "demo", *MICRO]
    run = tmp_path / "run"
    code, output = finish(start([*command, f"run.dir={run}"], bare_environment(tmp_path)))
    assert code == 0, output[-4000:]
    assert scores(run) == scores(micro_run)


@pytest.mark.ray
def test_cnn2gnn_run_on_ray(micro_run, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "cnn2gnn_dist", "run", "--config", "demo", *MICRO]
    code, output = finish(start([*command, f"run.dir={run}"], bare_environment(tmp_path)))
    assert code == 0, output[-4000:]
    assert scores(run) == scores(micro_run)

    code, output = finish(start([*command, f"run.dir={run}"], bare_environment(tmp_path)))
    assert code == 0
    for stage in ("pack", "index", "teacher", "targets", "student", "graph", "control", "evaluate"):
        assert f"{stage:8} complete, skipped" in output
    assert not (tmp_path / ".ray").exists()  # a token there would be required by the user's own Ray


def jobs_script(tmp_path: Path, session: Path, run: Path, stopped: Path) -> str:
    """A script that starts a cluster, submits jobs in every way, stops one, and prints the exit code of each."""
    ports = {"gcs": 6379, "dashboard": 8265, "client": 10001}  # of a network of its own
    teacher = (
        f"{sys.executable} -m cnn2gnn_dist teacher --config demo {_quoted(MICRO)} run.dir={run}"
    )
    cluster = f"cluster.address=127.0.0.1:{ports['gcs']}"
    return f"""
    ip link set lo up
    ray get-auth-token --generate > /dev/null
    RAY_JOB_STOP_WAIT_TIME_S=200 PATH=/usr/local/bin:/usr/bin:/bin \
        {BIN}/ray start --head --block --disable-usage-stats \
        --node-ip-address 127.0.0.1 --port {ports["gcs"]} --num-cpus 2 \
        --dashboard-host 127.0.0.1 --dashboard-port {ports["dashboard"]} --include-dashboard true \
        --ray-client-server-port {ports["client"]} --temp-dir {session} > {tmp_path}/head.log 2>&1 &
    head=$!
    trap "kill -TERM $head; wait $head" EXIT
    export RAY_ADDRESS=http://127.0.0.1:{ports["dashboard"]}
    for i in $(seq 60); do RAY_AUTH_MODE=token ray job list > /dev/null 2>&1 && break; done
    RAY_AUTH_MODE=token ray job submit --working-dir . -- \
        {sys.executable} -m cnn2gnn_dist run --config demo {_quoted(MICRO)} run.dir={run}
    echo "submit exit $?"
    {sys.executable} launch/submit.py --address $RAY_ADDRESS -- --config demo {_quoted(MICRO)} \
        run.dir={run} --dry-run
    echo "script exit $?"
    {sys.executable} launch/submit.py --address $RAY_ADDRESS -- --config demo {_quoted(MICRO)} \
        run.dir={run} data.limit=399
    echo "failing exit $?"
    {sys.executable} launch/submit.py --address $RAY_ADDRESS -- --config demo student.epoch=1
    echo "wrong exit $?"
    {teacher} {cluster}
    echo "cluster exit $?"
    HOME={tmp_path}/other {teacher} {cluster}
    echo "tokenless cluster exit $?"
    HOME={tmp_path}/other {sys.executable} launch/submit.py --address $RAY_ADDRESS -- --config demo
    echo "tokenless script exit $?"
    export RAY_AUTH_MODE=token
    ray job submit --no-wait --submission-id stopped --working-dir . -- {sys.executable} -m cnn2gnn_dist run \
        --config demo {_quoted(MICRO)} teacher.epochs=2000 checkpoint.every_steps=100000 cluster.grace_s=180 \
        run.dir={stopped}
    for i in $(seq 4000); do [ -s {stopped}/teacher/metrics.jsonl ] && break; sleep 0.1; done
    ray job stop stopped
    ray job logs stopped
    """


@pytest.mark.ray
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None,
    reason="Ray's job server binds to the network: the test wants a network namespace (root, unshare)",
)
def test_ray_job(micro_run, tmp_path):
    """`ray job submit`, launch/submit.py, cluster.address= and `ray job stop`, on a cluster that requires
    the token in the user's home, and that was started without an activated environment. The head sees
    only loopback.
    """
    run, run_3 = tmp_path / "job", tmp_path / "job-3"
    with short_folder() as session:
        script = jobs_script(tmp_path, session, run, run_3)
        alone = ["unshare", "-n", "bash", "-c", script]
        process = start(alone, bare_environment(tmp_path / "home"))
        try:
            _, output = finish(process, 1500)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert "submit exit 0" in output, output[-6000:]
    assert "script exit 0" in output, output[-3000:]
    assert "failing exit 2" in output, output[-3000:]
    assert "wrong exit 2" in output, output[-3000:]
    assert "did you mean student.epochs?" in output
    assert "cluster exit 0" in output, output[-3000:]
    for way in ("cluster", "script"):
        assert f"tokenless {way} exit 2" in output, output[-3000:]
    assert output.count("requires a token, but there is none here") == 2
    assert "Traceback" not in output.split("failing exit")[1].split("tokenless script exit")[0]
    assert scores(run) == scores(micro_run)
    step = re.search(r"teacher was asked to stop: step (\d+) is saved", output)
    assert step, output[-3000:]
    # No config, checkpoint, metrics file or report contains the cluster's token.
    token = (tmp_path / "home" / ".ray" / "auth_token").read_bytes().strip()
    made = [path for folder in (run, run_3) for path in folder.rglob("*") if path.is_file()]
    assert len(token) >= 32
    assert len(made) > 100
    assert [path for path in made if token in path.read_bytes()] == []
    latest = run_3 / "teacher" / "checkpoints" / "latest"
    assert latest.read_text() == f"step-{int(step[1]):08d}"


def _quoted(arguments: list[str]) -> str:
    return " ".join(f"'{argument}'" for argument in arguments)


def test_submit_names_the_remedy_when_no_server_answers():
    command = [sys.executable, "launch/submit.py", "--address", f"http://127.0.0.1:{free_port()}"]
    done = subprocess.run(
        [*command, "--", "--config", "demo"], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 2
    assert "ray start --head" in done.stderr
    assert "Traceback" not in done.stderr


def test_dry_run_prints_config_and_plan(micro_run, capsys):
    command = ["run", "--config", "demo", *MICRO]
    assert cli.main([*command, f"run.dir={micro_run}", "student.epochs=5", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "epochs: 5" in printed
    plan = printed.splitlines()[-9:]
    assert plan[3].split()[:2] == ["targets", "complete"]
    assert "student.epochs: 3 -> 5" in plan[4]
    done_json = json.loads((micro_run / "student" / "done.json").read_text())
    assert done_json["parts"]["student.epochs"] == 3
