"""cluster/kuberay through kubectl's own kustomize, which needs no cluster."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import yaml

from tests.support import REPOSITORY

FOLDER = REPOSITORY / "cluster" / "kuberay"


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("name", ["rayjob", "raycluster", "rayservice"])
def test_the_three_lines_reach_every_pod(tmp_path, name):
    copy = shutil.copytree(FOLDER, tmp_path / "kuberay")
    text = (copy / "kustomization.yaml").read_text().replace("- rayjob.yaml", f"- {name}.yaml")
    text = text.replace("registry.example", "our.registry").replace("value: shared", "value: fast")
    (copy / "kustomization.yaml").write_text(text.replace("runs/imagenet run.ranks=8", "other"))
    done = subprocess.run(
        ["kubectl", "kustomize", str(copy)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    claim, resource = yaml.safe_load_all(done.stdout)
    assert claim["spec"]["storageClassName"] == "fast"
    assert resource["kind"].lower() == name
    images = [line.split()[1] for line in done.stdout.splitlines() if " image: " in line]
    assert images == ["our.registry/cnn2gnn-dist:0.1.0"] * 2
    if name == "rayjob":
        assert resource["spec"]["entrypoint"].endswith("run.dir=/shared/other")
