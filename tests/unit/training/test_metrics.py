"""Metrics of a training: lines, kills in the middle of a line, resuming, the console."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import pytest

from cnn2gnn_dist import durable
from cnn2gnn_dist.durable import read_lines
from cnn2gnn_dist.training import metrics
from cnn2gnn_dist.training.metrics import MetricsLog, process_memory_mb


def quiet(folder: Path, rank: int = 0) -> MetricsLog:
    return MetricsLog(folder, rank, tensorboard=False, console=False)


def test_lines_come_back(tmp_path: Path) -> None:
    log = quiet(tmp_path / "new" / "folder")
    log.log(1, loss=2.5, lr=1e-3)
    log.log(2, loss=2.25)
    found = read_lines(log.path)
    assert [line["step"] for line in found] == [1, 2]
    assert found[0]["loss"] == 2.5
    assert found[0]["lr"] == 1e-3
    assert found[0]["time"] <= found[1]["time"]


def test_a_line_is_on_disk_when_log_returns(tmp_path: Path) -> None:
    log = quiet(tmp_path)
    log.log(1, loss=1.0)
    assert log.path.read_text().endswith("\n")


def test_only_rank_0_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], console: None
) -> None:
    log = MetricsLog(tmp_path, 1)
    log.log(1, loss=1.0)
    log.truncate_after(0)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_resume_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    log = quiet(tmp_path)
    for step in range(1, 6):
        log.log(step, loss=float(step))
    again = quiet(tmp_path)
    again.truncate_after(3)
    again.log(4, loss=40.0)
    assert [(x["step"], x["loss"]) for x in read_lines(log.path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncating_nothing_is_fine(tmp_path: Path) -> None:
    quiet(tmp_path).truncate_after(3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path, cut: int) -> None:
    log = quiet(tmp_path)
    log.log(1, loss=1.0)
    whole = log.path.read_text()
    log.log(2, loss=2.0)
    text = log.path.read_text()
    log.path.write_text(text[: -cut - 1])
    assert [line["step"] for line in read_lines(log.path)] == [1]
    again = quiet(tmp_path)
    again.truncate_after(2)
    assert again.path.read_text() == whole
    again.log(2, loss=3.0)
    assert [line["step"] for line in read_lines(log.path)] == [1, 2]


def test_a_kill_while_truncating_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = quiet(tmp_path)
    for step in (1, 2):
        log.log(step, loss=1.0)
    before = log.path.read_text()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(durable.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        log.truncate_after(1)
    assert log.path.read_text() == before


def test_a_broken_line_costs_no_other(tmp_path: Path) -> None:
    """A broken log is no reason to stop training."""
    log = quiet(tmp_path)
    log.path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    assert [line["step"] for line in read_lines(log.path)] == [1, 3]


def test_a_value_that_is_no_number_is_still_json(tmp_path: Path) -> None:
    log = quiet(tmp_path)
    log.log(1, loss=float("nan"), lr=float("inf"))

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    line = json.loads(log.path.read_text(), parse_constant=refuse)
    assert line["loss"] is None
    assert line["lr"] is None


def test_console_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], console: None) -> None:
    MetricsLog(tmp_path, 0, tensorboard=False, name="teacher").log(
        120,
        epoch=3.0,
        loss=1.23449,
        accuracy=0.567,
        images_per_s=1234.4,
        wait_share=0.031,
        memory_mb=812.3,
        homophily=0.714,
        lr=0.1,
    )
    line = capsys.readouterr().err.rstrip()
    assert "teacher" in line
    assert line.endswith(
        "step 120    epoch 3.00  loss 1.234  acc 56.7%  1234 img/s  wait 3%"
        "  mem 812 MB  homophily 0.71"
    )


def test_the_console_is_throttled_but_shows_every_test(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    console: None,
) -> None:
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    log = MetricsLog(tmp_path, 0, tensorboard=False, name="student")
    log.log(1, loss=1.0)
    log.log(2, loss=2.0)
    log.log(2, test_accuracy=0.5)
    now[0] += metrics.CONSOLE_SECONDS
    log.log(3, loss=3.0)
    said = capsys.readouterr().err
    assert [line.split("step")[1].split()[0] for line in said.splitlines()] == ["1", "2", "3"]
    assert "test 50.0%" in said
    assert "loss 2" not in said
    assert len(read_lines(log.path)) == 4


def test_tensorboard_forgets_what_was_truncated(tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator
    log = MetricsLog(tmp_path, 0, console=False)
    for step in (1, 2, 3, 4):
        log.log(step, loss=float(step))
    again = MetricsLog(tmp_path, 0, console=False)
    again.truncate_after(2)
    again.log(3, loss=30.0)
    events = accumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_memory_of_this_process() -> None:
    # Pages of a separate mapping: a large heap could return pages that are already resident.
    before = process_memory_mb()
    with mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        assert 32 < process_memory_mb() - before < 256
