"""Inference needs neither Ray nor DeepSpeed nor DGL."""

import subprocess
import sys

import pytest

from tests.support import light_install
from tests.support.models import pictures, write_model
from tests.support.runs import environment
from tests.support.shards import encode_image, make_shards

LIGHT = """
import sys
import cnn2gnn_dist
assert "torch" not in sys.modules, "the package itself imports torch"
import numpy as np
folder, image, out = sys.argv[1:4]
model = cnn2gnn_dist.load(folder)
assert model.predict(np.zeros((16, 16, 3), np.uint8)).label
from cnn2gnn_dist.cli import main
for kind in ("jsonl", "csv", "parquet", "html"):
    assert main(["predict", "--model", folder, image, "--out", f"{out}/answers.{kind}"]) == 0
assert main(["predict", "--model", folder, image]) == 0
assert main(["predict", "--model", folder, image, "--out", f"{out}/answers/"]) == 0
assert main(["embed", "--model", folder, image, "--out", f"{out}/z.parquet"]) == 0
assert main(["memory", "ls", folder]) == 0
assert main(["memory", "add", folder, image, "--class", "class 1", "--dry-run"]) == 0
assert main(["audit", folder, "--out", f"{out}/audit", "--no-map"]) == 0
assert main(["export", folder, "--to", f"{out}/copy"]) == 0
assert main(["export", folder, "--to", f"{out}/programs", "--torch-export"]) == 0
assert main(["plan", "--images", "1000", "--classes", "10", "--teacher", "resnet10t"]) == 0
for labeled in sys.argv[4:]:
    assert main(["evaluate", "--model", folder, labeled]) == 0
others = (["run", "--config", "demo"], ["serve", folder], ["export", folder, "--to", f"{out}/onnx", "--onnx"])
for other in others:
    assert main(other) == 2
"""


def light(folder, requirements, *arguments):
    """Run ``LIGHT`` where only these requirements are installed."""
    installed = light_install.link(folder, requirements)
    return subprocess.run(
        [sys.executable, "-S", "-c", LIGHT, *map(str, arguments)],
        capture_output=True, text=True, cwd=folder.parent,
        env=environment(PYTHONPATH=str(installed)),
    )  # fmt: skip


def test_a_model_answers_with_what_the_package_requires_and_nothing_else(tmp_path):
    written, image = write_model(tmp_path / "m"), tmp_path / "a.jpg"
    image.write_bytes(encode_image(pictures(1, seed=5)[0], "jpg"))
    labeled = [tmp_path / "f", *make_shards(tmp_path / "s", pictures(3), range(3))]
    (labeled[0] / "class 1").mkdir(parents=True)
    (labeled[0] / "class 1" / "a.jpg").write_bytes(image.read_bytes())
    (tmp_path / "out").mkdir()
    required = light_install.base_requirements()
    done = light(tmp_path / "light", required, written, image, tmp_path / "out", *labeled)
    assert done.returncode == 0, done.stderr
    assert f"{image}  class " in done.stdout
    for extra in ("train", "serve", "onnx"):
        assert f"cnn2gnn-dist[{extra}]" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_requirement_that_is_missing_is_noticed(tmp_path):
    required = [one for one in light_install.base_requirements() if not one.startswith("pyarrow")]
    assert len(required) == len(light_install.base_requirements()) - 1
    done = light(tmp_path / "light", required, write_model(tmp_path / "m"), "a.png", tmp_path)
    assert done.returncode == 1
    assert "No module named 'pyarrow'" in done.stderr


FIRST_ANSWER = """
import sys
import cnn2gnn_dist
NOT_NEEDED = {"pandas", "pyarrow.dataset", "pyarrow.compute", "ray", "deepspeed", "dgl", "webdataset",
              "tensorboard", "matplotlib", "sklearn", "scipy", "torchvision", "timm", "torch._dynamo",
              "huggingface_hub", "fastapi", "uvicorn", "jinja2", "fsspec", "onnx", "yaml", "psutil",
              "cnn2gnn_dist.config"}
if sys.argv[1] == "python":
    answer = cnn2gnn_dist.load(sys.argv[2]).predict(sys.argv[3])
    assert answer.label and answer.neighbours[0].key
else:
    from cnn2gnn_dist.cli import main
    assert main(["predict", "--model", *sys.argv[2:]]) == 0
print("imported:", *sorted(NOT_NEEDED & set(sys.modules)))
"""


@pytest.mark.parametrize("how", ["python", "command line"])
def test_a_first_answer_imports_only_what_it_needs(tmp_path, how):
    """Importing any of these packages delays a first answer by a tenth of a second to several seconds."""
    written, image = write_model(tmp_path / "m"), tmp_path / "a.png"
    image.write_bytes(encode_image(pictures(1)[0]))
    done = subprocess.run(
        [sys.executable, "-c", FIRST_ANSWER, how, str(written), str(image)],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported:"
