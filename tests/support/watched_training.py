"""One rank of a small run whose device reads are counted, or whose loss is set to NaN."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import cnn2gnn_dist
from cnn2gnn_dist import settings
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.pipeline import runner
from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.stages import student
from tests.support.runs import MICRO

PACKAGE = Path(cnn2gnn_dist.__file__).parent
PYTHON = {
    getattr(Tensor, name)
    for name in [
        "item",
        "tolist",
        "numpy",
        "cpu",
        "__array__",
        "__float__",
        "__int__",
        "__bool__",
        "__index__",
    ]
}
"""Tensor methods that copy values to Python."""
INSIDE = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal"}
"""torch operators that need values on the host."""
STAGES = {"stages/teacher": "teacher", "stages/student": "student"}


class Reads:
    """Counts of reads by training stage and by calling function of the package."""

    def __init__(self) -> None:
        self.found: dict[str, Counter[str]] = {}

    def note(self) -> None:
        """Count a read for the caller."""
        asked, frame = None, sys._getframe(2)
        while frame is not None:
            path, code = Path(frame.f_code.co_filename), frame.f_code
            if "deepspeed" in path.parts and asked is None:
                return  # DeepSpeed's own read; on the CPU, that of Adam's step count
            if path.is_relative_to(PACKAGE):
                where = path.relative_to(PACKAGE).with_suffix("").as_posix()
                asked = asked or f"{where}.{code.co_name}"
                if where in STAGES and code.co_name == "run":
                    self.found.setdefault(STAGES[where], Counter())[asked] += 1
                    return
            frame = frame.f_back

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the reads within this block."""
        with _Python(self), _Operators(self):
            yield


class _Python(TorchFunctionMode):
    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in PYTHON:
            self.reads.note()
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in INSIDE:
            self.reads.note()
        return func(*args, **(kwargs or {}))


def spoil_loss(step: int) -> None:
    """Make the student's loss NaN from this step on, on this rank."""
    calls, whole = [0], student.loss_of

    def spoilt(*arguments):
        calls[0] += 1
        return whole(*arguments) * (float("nan") if calls[0] > step else 1.0)

    student.loss_of = spoilt


def main(folder: Path, what: str, overrides: list[str]) -> int:
    """Run all stages up to the student's; return the exit code of a UserError, else 0.

    Args:
        folder: gets ``rank-N.json``: the counts by stage and by calling function of the package.
        what: "reads" to count them, or the step from which on rank 1's loss is NaN.
        overrides: of the config.
    """
    torch.set_num_threads(1)
    ranks, reads = Ranks.from_environment(), Reads()
    how = [*MICRO, f"run.dir={folder / 'run'}", *overrides]
    tree = settings.as_tree(settings.load("demo", how))
    stages = ["pack", "index", "teacher", "targets", "student"]
    if what != "reads" and ranks.rank == 1:
        spoil_loss(int(what))
    try:
        if what == "reads":
            with reads.counted():
                runner.run_rank(tree, stages, False, False, ranks)
        else:
            runner.run_rank(tree, stages, False, False, ranks)
    except UserError as error:
        print(f"rank {ranks.rank} is told: {error}", flush=True)
        return error.exit_code
    (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(reads.found))
    return 0
