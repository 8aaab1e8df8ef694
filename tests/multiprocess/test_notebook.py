"""The notebook runs from its first cell to its last, on a small model."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cnn2gnn_dist import cli
from tests.support import short_folder
from tests.support.models import calibrate, write_model

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


def test_the_notebook_runs(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    manager = pytest.importorskip("jupyter_client.manager")
    calibrate(write_model(tmp_path / "m"))
    monkeypatch.setenv("CNN2GNN_MODEL", str(tmp_path / "m"))
    (tmp_path / "copies").mkdir()
    monkeypatch.setenv(
        "TMPDIR", str(tmp_path / "copies")
    )  # where the notebook puts the model that it edits
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with short_folder() as place:
        # Sockets with paths: a port that is chosen first may be taken when the kernel listens.
        kernel = manager.AsyncKernelManager(
            kernel_name="python3", transport="ipc", ip=str(place / "kernel")
        )
        client = nbclient.NotebookClient(notebook, timeout=600, startup_timeout=300, km=kernel)
        client.execute(cwd=tmp_path, cleanup_kc=True)
    texts = [
        "".join(
            o.get("text", "") or str(o.get("data", {}).get("text/plain", "")) for o in cell.outputs
        )
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    assert "3 classes, 40 images in the memory" in texts[0]
    assert "may lose  1.00" in texts[3]
    assert texts[3].count("('stripes', 'new class')") >= 2
    assert "stripes" not in texts[4]
    (edited,) = (tmp_path / "copies").glob("*/model")
    out = tmp_path / "audit"
    assert cli.main(["audit", str(edited), "--out", str(out), "--no-map"]) == 0
    labels = pq.read_table(out / "labels.parquet").to_pylist()
    pairs = pq.read_table(out / "duplicates.parquet").num_rows
    assert len(labels) >= 5
    first = [f"{row['key']}: {row['class']}, rather {row['suggested']}" for row in labels[:5]]
    said = f"another class fits {len(labels)} images better; {pairs} pairs of copies"
    assert texts[5].splitlines() == [said, *first]
