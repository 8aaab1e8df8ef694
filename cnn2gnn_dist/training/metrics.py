"""Metrics of a training: JSON lines, TensorBoard, one line on the console."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import psutil

from cnn2gnn_dist import durable

_log = logging.getLogger(__name__)

CONSOLE_SECONDS = 2.0


def process_memory_mb() -> float:
    """Resident memory of this process, in MiB."""
    return psutil.Process().memory_info().rss / 2**20


class MetricsLog:
    """Metrics of one training; only rank 0 writes.

    Args:
        folder: gets ``metrics.jsonl`` and ``tensorboard/``.
        rank: of this process.
        name: first word of the console line.
        tensorboard, console: whether to write those too.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        *,
        name: str = "train",
        tensorboard: bool = True,
        console: bool = True,
    ) -> None:
        self.path = Path(folder) / "metrics.jsonl"
        self.name, self.console, self.silent = name, console, rank != 0
        self._last_shown = float("-inf")
        self._wants_board = tensorboard
        self._board: Any = None
        self._purge: int | None = None
        if not self.silent:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def log(self, step: int, **values: float | str) -> None:
        """Record values after ``step`` optimizer steps."""
        if self.silent:
            return
        # NaN and infinity are not valid JSON.
        finite = {
            k: v if isinstance(v, str) or math.isfinite(v) else None for k, v in values.items()
        }
        line = {"step": step, "time": round(time.time(), 3), **finite}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._draw(step, values)
        due = time.monotonic() - self._last_shown >= CONSOLE_SECONDS
        if self.console and (due or "test_accuracy" in values):
            self._last_shown = time.monotonic()
            _log.info(_console_line(step, values), extra={"stage": self.name})
        else:
            _log.debug(_console_line(step, values), extra={"stage": self.name})

    def _draw(self, step: int, values: dict[str, float | str]) -> None:
        if not self._wants_board:
            return
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step: TensorBoard drops what a killed run wrote after its checkpoint.
            self._board = SummaryWriter(
                str(self.path.parent / "tensorboard"), purge_step=self._purge
            )
        for name, value in values.items():
            if isinstance(value, str):
                continue
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def flush(self) -> None:
        """Wait until all lines are on disk: a checkpoint relies on those before it."""
        if not self.silent and self.path.exists():
            durable.sync(self.path)

    def truncate_after(self, step: int) -> None:
        """Drop what was logged after ``step``: a resumed run logs it again.

        Call it before the first ``log``.
        """
        self._purge = step + 1
        if self.silent or not self.path.exists():
            return
        kept = [line for line in durable.read_lines(self.path) if line["step"] <= step]
        durable.write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))


_CONSOLE = (
    ("epoch", "epoch {:.2f}"),
    ("loss", "loss {:.3f}"),
    ("accuracy", "acc {:.1%}"),
    ("test_accuracy", "test {:.1%}"),
    ("self_path_test_accuracy", "test (self path) {:.1%}"),
    ("images_per_s", "{:.0f} img/s"),
    ("wait_share", "wait {:.0%}"),
    ("memory_mb", "mem {:.0f} MB"),
    ("homophily", "homophily {:.2f}"),
)


def _console_line(step: int, values: dict[str, float | str]) -> str:
    shown = [text.format(values[key]) for key, text in _CONSOLE if key in values]
    return f"step {step:<6} " + "  ".join(shown)
