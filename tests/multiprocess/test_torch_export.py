"""Exported programs answer as the model does, in a process that has only torch and numpy."""

import subprocess
import sys

import numpy as np
import pytest

from cnn2gnn_dist import cli
from cnn2gnn_dist.inference.classifier import Classifier
from tests.support.models import pictures, write_model

PROGRAM = """
import json, sys
import numpy as np, torch
folder, given, answers = sys.argv[1:]
encoder, head = (torch.export.load(f"{folder}/{name}.pt2").module() for name in ("encoder", "head"))
fanout = json.load(open(f"{folder}/meta.json"))["fanout"]
memory, found = np.load(f"{folder}/memory.npz"), {}
for name, images in np.load(given).items():
    x, z, own = encoder(torch.from_numpy(images))
    apart = torch.cdist(z, torch.from_numpy(memory["z"]))
    near = apart.argsort(dim=1, stable=True)[:, :fanout].numpy()
    columns = [torch.from_numpy(memory[column][near]) for column in ("x", "z", "mean", "labels")]
    logits, weights = head(x, z, *columns)
    found |= {f"{name}_logits": logits.detach().numpy(), f"{name}_own": own.detach().numpy()}
assert not [name for name in sys.modules if name.startswith("cnn2gnn_dist")]
np.savez(answers, **found)
"""


def test_the_programs_answer_as_the_model_for_any_batch(tmp_path):
    folder = write_model(tmp_path / "m")
    given = {f"of{count}": pictures(count, seed=6) for count in (1, 3, 7)}
    np.savez(tmp_path / "given.npz", **given)
    target = tmp_path / "programs"
    assert cli.main(["export", str(folder), "--to", str(target), "--torch-export"]) == 0
    assert not list(tmp_path.glob(".programs*"))
    subprocess.run(
        [sys.executable, "-c", PROGRAM, str(target), str(tmp_path / "given.npz"),
         str(tmp_path / "answers.npz")],
        check=True, cwd=tmp_path, env={"PATH": ""},
    )  # fmt: skip
    model = Classifier.open(folder, device="cpu")
    with np.load(tmp_path / "answers.npz") as answers:
        for name, images in given.items():
            ours = model.network(images, model.memory)
            np.testing.assert_allclose(answers[f"{name}_logits"], ours.logits, atol=1e-3)
            np.testing.assert_allclose(answers[f"{name}_own"], ours.self_logits, atol=1e-3)


def test_one_format_at_a_time(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["export", "m", "--to", "x", "--onnx", "--torch-export"])
    assert "not allowed with" in capsys.readouterr().err


def test_a_student_without_a_graph_is_one_program(tmp_path):
    folder = write_model(tmp_path / "m", "none")
    assert cli.main(["export", str(folder), "--to", str(tmp_path / "p"), "--torch-export"]) == 0
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["encoder.pt2", "meta.json"]
