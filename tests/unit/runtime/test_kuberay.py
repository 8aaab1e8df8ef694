"""The manifests of cluster/kuberay are checked against KubeRay's schema, our config, and each other."""

from __future__ import annotations

import lzma
import math
import re
import shlex
from typing import Any

import pytest
import yaml

from cnn2gnn_dist import settings
from tests.support import REPOSITORY

FOLDER = REPOSITORY / "cluster" / "kuberay"
CRD = REPOSITORY.parent / "shared" / "cluster" / "rayjobs-1.7.0.yaml.xz"
"""KubeRay's published definition of a RayJob; its cluster has the schema of the other two kinds."""
SPEC = {
    "rayjob": ("rayClusterSpec",),
    "raycluster": (),
    "rayservice": ("rayClusterConfig",),
}
STORE_SHARE = 0.3
"""Share of its memory that a Ray node takes for the object store in /dev/shm."""


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def cluster(name: str) -> dict[str, Any]:
    spec = manifest(name)["spec"]
    for key in SPEC[name]:
        spec = spec[key]
    return spec


def pods(name: str) -> list[dict[str, Any]]:
    found = cluster(name)
    groups = [found["headGroupSpec"], *found["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def amount(text: str) -> float:
    """A Kubernetes quantity, in bytes or units."""
    number, unit = re.fullmatch(r"([\d.]+)(\w*)", text).groups()
    return float(number) * {"": 1, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}[unit]


@pytest.fixture(scope="module")
def crd() -> dict[str, Any]:
    """What a RayJob's ``spec`` may contain; unknown fields are errors."""
    if not CRD.is_file():
        pytest.skip(f"KubeRay's definition is not at {CRD}")
    whole = yaml.load(lzma.decompress(CRD.read_bytes()), Loader=yaml.CSafeLoader)
    (version,) = [one for one in whole["spec"]["versions"] if one["name"] == "v1"]
    return strict(version["schema"]["openAPIV3Schema"]["properties"]["spec"])


def strict(schema: Any) -> Any:
    """Refuse unknown fields, which the API server silently drops: a typing error would pass."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items() if key != "properties"}
    if "properties" in schema:
        found["properties"] = {name: strict(one) for name, one in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            found.setdefault("additionalProperties", False)
    return found


def faults(schema: dict[str, Any], found: Any) -> list[str]:
    import jsonschema

    errors = jsonschema.Draft202012Validator(schema).iter_errors(found)
    return [f"{'.'.join(map(str, error.path))}: {error.message[:200]}" for error in errors]


@pytest.mark.parametrize("name", SPEC)
def test_the_operator_accepts_it(crd, name):
    found = manifest(name)
    assert (found["apiVersion"], found["kind"].lower()) == ("ray.io/v1", name)
    assert faults(crd["properties"]["rayClusterSpec"], cluster(name)) == []
    if name == "rayjob":
        assert faults(crd, found["spec"]) == []


def test_a_typing_error_is_found(crd):
    found = cluster("rayjob")
    found["workerGroupSpecs"][0]["minReplica"] = 8
    (fault,) = faults(crd["properties"]["rayClusterSpec"], found)
    assert "minReplica" in fault


def run_of(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The config of a RayJob's command, as its head would resolve it."""
    text = manifest("rayjob")["spec"]["entrypoint"]
    words = shlex.split(text)
    assert words[:3] == ["cnn2gnn", "run", "--config"]
    for one in pods(name)[0]["containers"][0]["env"]:
        monkeypatch.setenv(one["name"], one["value"])
    return settings.load(words[3], words[4:])


@pytest.mark.parametrize("name", ["rayjob", "raycluster"])
def test_the_run_fits_the_cluster(name, monkeypatch):
    config = run_of(name, monkeypatch)
    found = cluster(name)
    assert found["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (group,) = found["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]
    assert config.device == "cuda"
    assert config.run.ranks == group["replicas"] * gpus
    offered = group["rayStartParams"]
    assert int(offered["num-gpus"]) == gpus
    assert offered["num-cpus"] == container["resources"]["requests"]["cpu"]
    assert gpus * (config.cluster.cpus_per_rank + config.stream.workers) <= int(offered["num-cpus"])
    shared = next(one for one in container["volumeMounts"] if one["name"] == "shared")
    for path in (str(config.run.dir), str(config.data.train)):
        assert path.startswith(f"{shared['mountPath']}/")


def test_a_job_has_the_cluster_that_stays():
    assert cluster("rayjob") == cluster("raycluster")


@pytest.mark.parametrize("name", SPEC)
def test_each_pod_has_what_ray_needs(name):
    found = cluster(name)
    assert found["authOptions"] == {"mode": "token"}
    pin = re.search(r"^ray==(.*)$", (REPOSITORY / "constraints.txt").read_text(), re.M)
    assert found["rayVersion"] == pin[1]
    for pod in pods(name):
        assert pod["terminationGracePeriodSeconds"] >= 60
        assert pod["nodeSelector"]
        assert pod["securityContext"]["runAsNonRoot"]
        (container,) = pod["containers"]
        limits, requests = container["resources"]["limits"], container["resources"]["requests"]
        assert "cpu" in requests
        assert "cpu" not in limits  # a throttled rank holds up all others
        assert requests["memory"] == limits["memory"]
        volumes = {one["name"]: one for one in pod["volumes"]}
        mounts = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
        assert set(mounts.values()) == set(volumes)
        memory = volumes[mounts["/dev/shm"]]["emptyDir"]
        assert memory["medium"] == "Memory"
        assert amount(memory["sizeLimit"]) >= STORE_SHARE * amount(limits["memory"])
        claim = volumes[mounts["/shared"]]["persistentVolumeClaim"]["claimName"]
        assert claim == manifest("storage")["metadata"]["name"]


def test_ranks_have_probes():
    for pod in pods("rayjob"):
        (container,) = pod["containers"]
        patience = [
            probe["periodSeconds"] * probe["failureThreshold"]
            for probe in (container["readinessProbe"], container["livenessProbe"])
        ]
        assert patience == [60, 600]


def test_the_service_is_an_application_of_ours():
    pytest.importorskip("ray.serve.schema")
    from ray.serve.schema import ServeDeploySchema

    from cnn2gnn_dist.serving.ray_app import Options

    found = yaml.safe_load(manifest("rayservice")["spec"]["serveConfigV2"])
    (application,) = ServeDeploySchema.model_validate(found).applications
    Options.model_validate(application.args)
    (deployment,) = application.deployments
    (group,) = cluster("rayservice")["workerGroupSpecs"]
    per_node = int(group["rayStartParams"]["num-cpus"]) // deployment.ray_actor_options.num_cpus
    assert deployment.num_replicas <= math.floor(per_node) * group["replicas"]
    (pod,) = {pod["terminationGracePeriodSeconds"] for pod in pods("rayservice")}
    assert pod > deployment.graceful_shutdown_timeout_s


def test_the_three_lines_are_those_of_the_manifests():
    lines = (FOLDER / "kustomization.yaml").read_text()
    assert re.findall(r"# (\d): ", lines) == ["1", "2", "3"]
    found = yaml.safe_load(lines)
    (image,) = found["images"]
    assert {pod["containers"][0]["image"] for name in SPEC for pod in pods(name)} == {image["name"]}
    assert all((FOLDER / name).is_file() for name in found["resources"])
    claim, job = (yaml.safe_load(one["patch"])[0]["value"] for one in found["patches"])
    assert claim == manifest("storage")["spec"]["storageClassName"]
    assert job == manifest("rayjob")["spec"]["entrypoint"]
