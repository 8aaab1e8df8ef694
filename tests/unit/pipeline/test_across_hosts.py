"""What hosts with folders of their own are to have of a complete stage."""

from __future__ import annotations

import hashlib
import json

import pytest

from cnn2gnn_dist.pipeline.across_hosts import as_written
from cnn2gnn_dist.runtime.shared_files.handover import Written


def described(data: bytes) -> Written:
    return Written(len(data), hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("harm", [b"evil", b"goo", None])
def test_a_damaged_file_is_described_as_it_was_written(tmp_path, harm):
    kept = tmp_path / "checkpoints" / "step-00000007"
    kept.mkdir(parents=True)
    listed = {"share": described(b"good"), "sub/state": described(b"1")}
    (kept / "manifest.json").write_text(json.dumps({"files": listed}))
    (kept / "sub").mkdir()
    (kept / "sub" / "state").write_bytes(b"1")
    if harm is not None:
        (kept / "share").write_bytes(harm)
    (tmp_path / "metrics.jsonl").write_bytes(b"lines")
    inside = "checkpoints/step-00000007"
    names = [f"{inside}/share", f"{inside}/sub/state", f"{inside}/manifest.json", "metrics.jsonl"]
    found = as_written(tmp_path, names)
    assert list(found) == names
    assert found[names[0]] == described(b"good")
    assert found[names[1]] == described(b"1")
    assert found[names[2]] == described((kept / "manifest.json").read_bytes())
    assert found[names[3]] == described(b"lines")


def test_a_manifest_that_is_none_describes_nothing(tmp_path):
    (tmp_path / "manifest.json").write_text("[]")
    (tmp_path / "a").write_bytes(b"a")
    assert as_written(tmp_path, ["a", "manifest.json"])["a"] == described(b"a")
