"""The ONNX export answers as torch does, in an example that imports no torch."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cnn2gnn_dist import cli, durable
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.inference.export import graphs, onnx_export, torch_export
from cnn2gnn_dist.inference.folder import artefact
from cnn2gnn_dist.models.block import nearest
from tests.support.models import pictures, write_model
from tests.support.shards import encode_image

EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_predict.py"
pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("columns", [1, 2, 3, 8])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_weights_of_sorted_distances_are_those_of_adaptive_neighbours(columns, k):
    d = torch.rand(40, columns, generator=torch.Generator().manual_seed(0)).sort(1).values
    d[0] = 0.5
    expected = nearest(d, k, torch.ones_like(d, dtype=torch.bool)).p_BM
    torch.testing.assert_close(graphs.weights_of_sorted(d, k), expected)


@pytest.mark.filterwarnings("error:# The axis name")
@pytest.mark.filterwarnings("error:`isinstance.treespec, LeafSpec")  # by torch, about itself
@pytest.mark.parametrize("resize", [1.0, 1.25])
def test_the_example_answers_as_the_model(tmp_path, resize):
    folder = write_model(tmp_path / "m")
    tree = json.loads((folder / artefact.CONFIG).read_text())
    tree["views"]["resize"] = resize  # with 1.25, the middle 16 of 20 rows are seen
    (folder / artefact.CONFIG).write_text(json.dumps(tree))
    artefact.write_checksums(folder)
    images = [tmp_path / f"{n}.png" for n in range(3)]
    for path, image in zip(images, pictures(3, seed=6), strict=True):
        whole = image if resize == 1.0 else np.pad(image, ((2, 2), (4, 4), (0, 0)), mode="wrap")
        path.write_bytes(encode_image(whole))
    alpha = Image.fromarray(
        np.linspace(0, 255, image[..., 0].size).astype(np.uint8).reshape(16, 16)
    )
    clear = Image.open(images[-1])
    clear.putalpha(alpha.resize(clear.size))
    clear.save(images[-1])  # partly transparent
    assert cli.main(["export", str(folder), "--to", str(tmp_path / "onnx"), "--onnx"]) == 0
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(tmp_path / "onnx"), *map(str, images)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    expected = [
        f"{a.name}  {a.label} {a.probability:.1%}"
        for a in Classifier.open(folder, device="cpu").predict(images)
    ]
    assert done.stdout.splitlines() == expected
    with pytest.raises(UserError, match="something already exists here"):
        onnx_export.export(Classifier.open(folder, device="cpu"), tmp_path / "onnx")


@pytest.mark.parametrize("scope", ["none", "dataset"])
def test_the_example_is_named_where_it_can_answer(scope, tmp_path, capsys):
    """It searches a memory, which a control has not."""
    folder, target = write_model(tmp_path / "m", scope), tmp_path / "onnx"
    assert cli.main(["export", str(folder), "--to", str(target), "--onnx"]) == 0
    said = capsys.readouterr().out
    assert ("onnx_predict.py" in said) == (scope == "dataset") == (target / "memory.npz").exists()
    assert ("self_logits of encoder.onnx" in said) == (scope == "none")


@pytest.mark.parametrize("kind", [onnx_export._Onnx(), torch_export._Program()])
def test_a_full_disk_is_an_error_of_the_disk(kind):
    model = torch.nn.Linear(2, 2).eval()
    with pytest.raises(UserError, match="disk full"), durable.disk_full_reported(Path("graphs")):
        kind.write(model, (torch.zeros(2, 2),), Path("/dev/full"), ["x"], ["y"])


@pytest.mark.parametrize("kind", ["--onnx", "--torch-export"])
def test_what_can_not_be_written_is_said_and_leaves_nothing(kind, tmp_path, monkeypatch, capsys):
    folder = write_model(tmp_path / "m")
    inside = folder / "config.json" / "graphs"
    assert cli.main(["export", str(folder), "--to", str(inside), kind]) == 2
    assert "this folder can't be written to: " in capsys.readouterr().err

    def full(path, **_):
        path.write_bytes(b"part")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez", full)
    assert cli.main(["export", str(folder), "--to", str(tmp_path / "graphs"), kind]) == 2
    assert "disk full" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_arrays_leave_out_what_was_removed(tmp_path):
    model = Classifier.open(write_model(tmp_path / "m"), device="cpu")
    arrays = graphs.memory_arrays(model.memory, 3)
    model.memory.live[5] = False
    model.memory.__dict__.pop("live_ids")
    fewer = graphs.memory_arrays(model.memory, 3)
    assert len(fewer["x"]) == len(arrays["x"]) - 1
    np.testing.assert_array_equal(fewer["z"], np.delete(arrays["z"], 5, 0))
