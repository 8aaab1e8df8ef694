"""Inference needs neither Ray nor DeepSpeed nor DGL."""

import subprocess
import sys

import pytest

from tests.support.models import pictures, write_model
from tests.support.shards import encode_image, make_shards

LIGHT = """
import importlib.abc, sys
HEAVY = {"ray", "deepspeed", "dgl", "webdataset", "tensorboard", "sklearn", "pandas", "matplotlib",
         "braceexpand", "jinja2", "fsspec", "fastapi", "uvicorn"}

class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
import cnn2gnn_dist
assert "torch" not in sys.modules, "the package itself imports torch"
import numpy as np
model = cnn2gnn_dist.load(sys.argv[1])
assert model.predict(np.zeros((16, 16, 3), np.uint8)).label
from cnn2gnn_dist.cli import main
assert main(["predict", "--model", *sys.argv[1:3]]) == 0
assert main(["memory", "ls", sys.argv[1]]) == 0
for labeled in sys.argv[3:]:
    assert main(["evaluate", "--model", sys.argv[1], labeled]) == 0
sys.exit(main(["run", "--config", "demo"]))
"""


def test_a_model_answers_without_the_packages_of_training(tmp_path):
    """The packages are hidden: a separate environment would have to download torch again."""
    written, image = write_model(tmp_path / "m"), tmp_path / "a.png"
    image.write_bytes(encode_image(pictures(1)[0]))
    labeled = [tmp_path / "f", *make_shards(tmp_path / "s", pictures(3), range(3))]
    (labeled[0] / "class 1").mkdir(parents=True)
    (labeled[0] / "class 1" / "a.png").write_bytes(image.read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, str(written), str(image), *map(str, labeled)],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert f"{image}  class " in done.stdout
    assert "cnn2gnn-dist[train]" in done.stderr
    assert "Traceback" not in done.stderr


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
