"""The doctor: across processes."""

from __future__ import annotations

from cnn2gnn_dist.commands.doctor import machine as doctor


def test_this_machine_can_run(capfd):
    assert doctor.command() == 0, capfd.readouterr().out
    said = capfd.readouterr()
    names = {line[6:].split()[0] for line in said.out.splitlines() if line[:2] in ("ok", "wa")}
    assert names >= {
        "python", "torch", "torchvision", "timm", "deepspeed", "dgl", "ray", "webdataset", "pyarrow",
        "gpu", "shared", "disk", "memory", "open", "OMP_NUM_THREADS",
    }  # fmt: skip
    assert said.err == ""
    assert "Warning" not in said.out
