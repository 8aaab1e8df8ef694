"""A run that travels between machines as weights is continued by the product as if it had stayed."""

from __future__ import annotations

from pathlib import Path

from tests.end_to_end.test_variants import run
from tests.support.benchmarks import benchmark
from tests.support.runs import copy_before, scores

carried_runs = benchmark("carried_runs")


def test_finished_stages_that_came_as_weights_are_not_trained_again(
    micro_run: Path, tmp_path: Path
):
    cut, out, runs = tmp_path / "first" / "run", tmp_path / "out", tmp_path / "second"
    copy_before(micro_run, cut, "evaluation")
    assert carried_runs.write([cut], out, tmp_path / "scratch", limit=10**8, part=10**6) == []
    assert carried_runs.read(out, runs) == ["run"]
    lines = run(runs / "run").splitlines()
    for stage in ("teacher", "targets", "student", "graph", "control"):
        assert any(stage in line and "complete, skipped" in line for line in lines), stage
    assert scores(runs / "run") == scores(micro_run)
    assert carried_runs.is_finished(runs / "run")
