"""The app on a local Ray: replicas, versions by ``reconfigure``, a replica that dies."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import short_folder
from tests.support.ports import free_port
from tests.support.runs import environment
from tests.support.serving import TOKEN, served_model

pytestmark = pytest.mark.ray

DRIVER = '''
import contextlib, json, os, pathlib, re, signal, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
import httpx2 as httpx
import psutil
import ray
from ray import serve
from tests.support import held_replica
from tests.support.ports import free_port
from tests.support.runs import BIN
from tests.support.serving import ALLOWED, encoded, parts

model, port, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
dashboard = free_port()
ray.init(
    address="local", num_cpus=4, dashboard_port=dashboard, log_to_driver=False, _temp_dir=folder
)
serve.start(http_options={"host": "127.0.0.1", "port": port})
client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)


def deploy(version):
    """As KubeRay and `serve deploy` do."""
    application = {
        "name": "m",
        "import_path": "cnn2gnn_dist.serving.ray_app:build",
        "args": {"model": model},
        "deployments": [
            {
                "name": "Replica",
                "num_replicas": 2,
                "user_config": {"memory_version": version},
                "ray_actor_options": {"num_cpus": 0.5},
            }
        ],
    }
    config = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
    file = os.path.join(folder, "deploy.yaml")
    with open(file, "w") as text:
        json.dump(config, text)
    address = f"http://127.0.0.1:{dashboard}"
    subprocess.run([BIN / "serve", "deploy", file, "--address", address], check=True)


def replicas():
    """Of this driver's own Ray: another may serve on this host, too."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "".join(process.cmdline()).startswith("ray::ServeReplica:m"):
                found.add(process.pid)
    return found


def deployed():
    """Its status, and how many of its replicas answer."""
    found = serve.status().applications["m"].deployments["Replica"]
    return found.status, found.replica_states.get("RUNNING", 0)


def logs():
    """What the replicas have logged."""
    files = pathlib.Path(folder).glob("session_2*/logs/worker-*.err")
    return "".join(file.read_text() for file in files)


def metric(name):
    text = client.get("/metrics").text
    return float(re.search(rf"^cnn2gnn_{name} (.*)$", text, re.M)[1])


def say(**what):
    print(json.dumps(what), flush=True)


def versions():
    """Of 20 answers, which two replicas give."""
    images = parts(encoded(1, seed=5))
    answers = [client.post("/predict", files=images) for _ in range(20)]
    assert all(answer.status_code == 200 for answer in answers)
    return {answer.json()["memory_version"] for answer in answers}


try:
    deploy(None)
    while (status := serve.status().applications["m"].status) != "RUNNING":
        assert status == "DEPLOYING", serve.status()
    say(first=sorted(versions()), page=client.get("/").status_code, replicas=len(replicas()))
    made = client.post("/memory?class=new", files=parts(encoded(5, seed=11)), headers=ALLOWED)
    say(added=made.status_code, version=made.json()["memory"]["version"])
    while versions() != {1}:
        pass  # the replica that was not asked follows
    before = replicas()
    deploy(0)
    while versions() != {0}:
        pass
    say(restarted=replicas() != before)
    say(edit=client.post("/memory/undo", headers=ALLOWED).status_code)

    answered, failed, go_on = [], [], threading.Event()

    def ask():
        images = parts(encoded(2, seed=5))
        while not go_on.is_set() or len(answered) < 200:
            try:
                made = httpx.post(f"http://127.0.0.1:{port}/predict", files=images, timeout=120)
            except httpx.TransportError as error:
                failed.append(repr(error))
                continue
            (answered if made.status_code == 200 else failed).append(made.text)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    while len(answered) < 60:
        pass
    killed = min(replicas())
    os.kill(killed, signal.SIGKILL)
    go_on.set()
    for thread in threads:
        thread.join()
    say(answered=len(answered), different=len({json.dumps(json.loads(a)["answers"]) for a in answered}))

    while killed in replicas() or len(replicas()) < 2 or deployed() != ("HEALTHY", 2):
        pass  # it is replaced
    before = replicas()
    deploy(99)
    while "version 99 of the memory can't be loaded" not in logs():
        pass
    while deployed()[0] == "UPDATING":
        pass
    say(kept=replicas() == before, still=sorted(versions()))
    serve.delete("m")

    gate = os.path.join(folder, "gate")
    serve.run(held_replica.build(model, gate), name="m", route_prefix="/")
    images = parts(encoded(1, seed=5))
    with ThreadPoolExecutor(41) as pool:
        first = pool.submit(client.post, "/predict", files=images)
        while metric("requests_in_flight") < 2 or metric("images_waiting") > 0:
            pass  # the network has the first image, and is held; the other request is this one
        others = [pool.submit(client.post, "/predict", files=images) for _ in range(40)]
        while metric("images_waiting") < 40:
            pass
        open(gate, "w").close()
        codes = [one.result().status_code for one in (first, *others)]
    while metric("batch_images_sum") < 41:
        pass  # counted once the answers are out
    say(codes=sorted(set(codes)), batches=metric("batch_images_count"))
finally:
    serve.shutdown()
    ray.shutdown()
'''


def test_replicas(tmp_path: Path):
    pytest.importorskip("ray.serve", reason="ray[serve] is not installed", exc_type=ImportError)
    folder = served_model(tmp_path / "model")
    with short_folder() as short:
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, str(folder), str(free_port()), str(short)],
            env=environment(CNN2GNN_TOKEN=TOKEN), capture_output=True, text=True, timeout=900,
        )  # fmt: skip
    said: dict[str, object] = {}
    for line in re.findall(r"^\{.*\}$", done.stdout, re.MULTILINE):
        said |= json.loads(line)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (said["first"], said["page"], said["replicas"]) == ([0], 200, 2)
    assert (said["added"], said["version"]) == (201, 1)
    assert said["restarted"] is False
    assert said["edit"] == 409
    assert int(str(said["answered"])) >= 200
    assert said["different"] == 1, "every answer that came is whole and right"
    assert (said["kept"], said["still"]) == (True, [0]), (
        "a version that is not there stops no replica"
    )
    assert (said["codes"], said["batches"]) == ([200], 2), "40 requests that waited, in one batch"
