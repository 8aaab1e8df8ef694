"""Start a run as one rank of the DeepSpeed launcher, torchrun or srun; no Ray.

deepspeed --num_gpus 2 launch/train.py --deepspeed_config ds_config.json --config demo
torchrun --nproc_per_node 2 launch/train.py --config demo student.epochs=20
torchrun --nproc_per_node 2 -m cnn2gnn_dist.launcher --config demo    # the same, without a checkout
srun python launch/train.py --config imagenet      # meets on the step's first node
python launch/train.py --config demo               # a single process
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
import traceback
from typing import Any, NoReturn

from cnn2gnn_dist import log, settings
from cnn2gnn_dist.errors import Preempted, UserError
from cnn2gnn_dist.pipeline import runner
from cnn2gnn_dist.runtime import preemption
from cnn2gnn_dist.runtime.group import process_group
from cnn2gnn_dist.runtime.ranks import Ranks

_log = logging.getLogger(__name__)


def main() -> int:
    """Run the pipeline on this rank; returns the exit code.

    2 for an error that the user can fix, 75 for a lost peer, 143 after a request to stop
    (docs/resume.md), 1 for a bug, whose traceback is shown.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", default="demo", metavar="FILE_OR_PRESET")
    parser.add_argument("--stages", metavar="A,B", help="only these stages")
    parser.add_argument("--update", action="store_true", help="recompute stale results")
    parser.add_argument(
        "--force", action="store_true", help="resume from checkpoints of another config"
    )
    # What the DeepSpeed launcher puts on the command line.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--deepspeed_config", metavar="FILE", help="DeepSpeed config of both models"
    )
    log.add_options(parser)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    arguments, unknown = parser.parse_known_intermixed_args()
    if "LOCAL_RANK" in os.environ:  # a launcher's child; a shell's child must survive under nohup
        preemption.end_with_parent()
    try:
        with log.console(getattr(arguments, "verbosity", log.NORMAL)):
            return _run(arguments, unknown, parser.prog)
    except Exception:
        # An exception would end the interpreter, which waits for readers: perhaps of a file server that is gone.
        traceback.print_exc()
        return 1


def _run(arguments: argparse.Namespace, unknown: list[str], program: str) -> int:
    """This rank's part of the run; its exit code. ``unknown``: arguments that are not options."""
    ranks = Ranks()
    try:
        ranks = Ranks.from_environment()
        log.set_rank(ranks.rank)
        try:
            tree = _config(arguments, unknown, program, ranks)
        except UserError as error:
            process_group.decline(ranks, error)
        runner.run_rank(
            tree=tree,
            names=arguments.stages.split(",") if arguments.stages else None,
            update=arguments.update,
            force=arguments.force,
            inside_ray=False,
            ranks=ranks,
        )
    except UserError as error:
        # A request to stop reaches all ranks; of other ranks' other errors rank 0 may not learn.
        if ranks.is_first or not (error.shared or isinstance(error, Preempted)):
            log.report_error(
                error, program if ranks.is_first else f"{socket.gethostname()}: {program}"
            )
        return error.exit_code
    return 0


def _config(
    arguments: argparse.Namespace, unknown: list[str], program: str, ranks: Ranks
) -> dict[str, Any]:
    """The resolved config as plain data."""
    if unknown:
        raise settings.misplaced(unknown) or UserError(
            "no such option", where=" ".join(unknown), remedy=f"{program} --help"
        )
    overrides = list(arguments.overrides)
    if arguments.deepspeed_config:
        overrides += [
            f"{part}.ds_config={arguments.deepspeed_config}" for part in ("teacher", "student")
        ]
    note = _log.warning if ranks.is_first else None
    return settings.as_tree(settings.load(arguments.config, overrides, note))


def exit_now(code: int) -> NoReturn:
    """Exit this process without finalizing the interpreter.

    Threads of torch and gloo that request the GIL during finalization are unwound through C++ that
    may not throw, and a rank that had finished dies of SIGABRT (seen in 3 of about 40 launches).
    All files are closed by now.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    exit_now(main())
