"""Graph versions: across processes."""

from __future__ import annotations

from tests.support import REPOSITORY, own_mounts


@own_mounts.needed
def test_a_full_disk_leaves_the_version_before_in_use(tmp_path):
    """The disk is really full: a tmpfs of 1 MiB, filled while arrays, a part and the manifest are written."""
    script = REPOSITORY / "tests/support/full_disk_graph.py"
    (tmp_path / "d").mkdir()
    said = own_mounts.run(str(script), str(tmp_path / "d"))
    assert [step for step, _, _ in said] == ["arrays", "a part", "the manifest"]
    for _, problem, newest in said:
        assert "disk full" in problem
        assert newest == "v0001"
