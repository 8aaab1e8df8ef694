"""Submit a run to a Ray cluster's job server, follow its log, return its exit code.

cnn2gnn submit --address http://127.0.0.1:8265 -- --config demo run.dir=/shared/demo
python -m cnn2gnn_dist.submit …                    # the same
python launch/submit.py …                          # the same, from a checkout that is not installed

Everything after ``--`` goes to ``cnn2gnn run`` on the cluster, in a copy of this checkout: relative
paths start there, and tars are not sent. Ctrl-C leaves the job running and says how to follow it;
``--stop-on-interrupt`` stops it instead, as does SIGTERM then. Hosts without the package get it with
``--send-package``, and what it needs with ``--pip``.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from cnn2gnn_dist import log
from cnn2gnn_dist.errors import UserError, first_line
from cnn2gnn_dist.runtime.ray import probe as ray_probe

_log = logging.getLogger(__name__)

CHECKOUT = Path(__file__).resolve().parent.parent
DS_CONFIG = "ds_config.json"
EXCLUDES = [".git", "runs", ".venv", "**/*.tar", "**/__pycache__"]
ENTRYPOINT = r"""
case "$VIRTUAL_ENV" in
*/runtime_resources/pip/*) exec "$VIRTUAL_ENV/bin/python" -m cnn2gnn_dist run {arguments} ;;
esac
raylet=$(sed -n 's/^PPid:[^0-9]*//p' /proc/$PPID/status)
for python in $(tr '\0' '\n' < /proc/$raylet/cmdline \
| sed -n 's/^--python_worker_command=\([^ ]*\).*/\1/p') python python3; do
command -v "$python" > /dev/null && exec "$python" -m cnn2gnn_dist run {arguments}
done
echo "no python on PATH: activate its environment before ray start" >&2
exit 127
""".strip()
"""Runs under the interpreter of Ray's own workers (children of the raylet, whose command line names
it), whether or not its environment is activated; with ``--pip`` under that of the job's environment."""
STOP_SECONDS = 60.0
"""How long to wait for a job to end after asking it to; Ray kills it after 3."""


def main() -> int:
    """Submit, follow, report; the job's own exit code, or 2 if it can't be sent."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    arguments(parser)
    log.add_options(parser)
    options = parser.parse_args()
    try:
        with log.console(getattr(options, "verbosity", log.NORMAL)):
            return int(options.command(options))
    except UserError as error:
        log.report_error(error, parser.prog)
        return error.exit_code


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``cnn2gnn submit``."""
    parser.add_argument("--address", default="http://127.0.0.1:8265", help="the job server")
    parser.add_argument(
        "--working-dir",
        default=str(CHECKOUT if (CHECKOUT / "pyproject.toml").is_file() else Path.cwd()),
        help="folder to send to the cluster; default: this checkout, or the current folder if there is none",
    )
    parser.add_argument("--stop-on-interrupt", action="store_true", help="Ctrl-C stops the job")
    parser.add_argument(
        "--send-package",
        action="store_true",
        help="send this installation's cnn2gnn_dist too, for hosts without it",
    )
    parser.add_argument(
        "--pip",
        action="append",
        default=[],
        metavar="REQUIREMENT",
        help="install this on every host before the run, in a separate environment for the job; may be repeated",
    )
    parser.add_argument("arguments", nargs="*", help="arguments of `cnn2gnn run`, after --")
    parser.set_defaults(command=_submit)


def _submit(options: argparse.Namespace) -> int:
    from cnn2gnn_dist import (
        upload_checks,  # pydantic's models, which no other command should wait for
    )

    folder = Path(options.working_dir).resolve()
    upload_checks.check_paths(None, folder, options.arguments)  # as far as it goes without Ray
    ray_probe.bypass_proxies(options.address)
    where = f"--address {options.address}"
    os.environ[ray_probe.MODE] = ray_probe.job_server_mode(options.address, where)
    from aiohttp import ClientError

    # Imported only now, because Ray reads how to authenticate when it is imported.
    from ray.job_submission import JobSubmissionClient

    files = _files_to_send(folder)
    upload_checks.check_size(files, folder)
    upload_checks.check_paths(files, folder, options.arguments)
    _log.debug("sending %d files, %d KiB", len(files), sum(files.values()) >> 10)
    try:
        client = JobSubmissionClient(options.address)
        with tempfile.TemporaryDirectory() as scratch:
            job = client.submit_job(
                submission_id=f"cnn2gnn-{uuid.uuid4().hex[:8]}",
                entrypoint=ENTRYPOINT.format(arguments=shlex.join(options.arguments)),
                runtime_env=_runtime_env(folder, options, scratch),
            )
    except (OSError, RuntimeError, ValueError) as error:  # OSError: also those of requests
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(
            f"the job server rejected the job: {lines[0]}", where=where, remedy="see the head's log"
        ) from None
    log.output(f"submitted {job}")
    if options.stop_on_interrupt:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    later = f"if the cluster still runs: `ray job logs {job} --follow`, `ray job status {job}`"
    try:
        asyncio.run(_follow(client, job))
        found = client.get_job_info(job)
    except KeyboardInterrupt:
        if options.stop_on_interrupt:
            _stop(client, job)
        else:
            log.output(f"{job} keeps running; `ray job logs {job} --follow` shows its log")
        return 130
    except (OSError, RuntimeError, ClientError) as error:
        raise UserError(
            f"the job server stopped answering: {first_line(error)}",
            where=where,
            remedy=later,
        ) from None
    return exit_code(job, found, where, later)


def exit_code(job: str, found: Any, where: str, later: str) -> int:
    """Report how a job has ended (Ray's JobDetails), and return its exit code.

    Raises:
        UserError: it has not: the server has closed the log, as when it is restarted.
    """
    state = found.status.value
    if not found.status.is_terminal():
        raise UserError(f"the log of {job} ended, but it is {state}", where=where, remedy=later)
    log.output(f"{job}: {state}")
    if found.driver_exit_code is None and state == "FAILED" and found.message:
        _log.warning(
            found.message.strip()
        )  # it never started: its environment could not be created
    return 0 if state == "SUCCEEDED" else found.driver_exit_code or 1


def _runtime_env(folder: Path, options: argparse.Namespace, scratch: str) -> dict[str, Any]:
    """What Ray prepares on every host; ``scratch``: a folder that exists until the job is submitted."""
    found: dict[str, Any] = {"working_dir": str(folder), "excludes": EXCLUDES}
    if options.send_package:
        found["py_modules"] = [str(_package(Path(scratch)))]
    if options.pip:
        found["pip"] = options.pip
    return found


def _package(scratch: Path) -> Path:
    """This package as a wheel would install it; in a checkout its DeepSpeed config lies beside it."""
    package = Path(__file__).resolve().parent
    if (package / DS_CONFIG).is_file():
        return package
    copy = scratch / package.name
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(package.parent / DS_CONFIG, copy)
    return copy


def _stop(client: Any, job: str) -> None:
    """Stop a job, and wait until none of its processes is running."""
    client.stop_job(job)
    deadline = time.monotonic() + STOP_SECONDS
    while not client.get_job_status(job).is_terminal() and time.monotonic() < deadline:
        time.sleep(0.2)
    log.output(f"{job}: {client.get_job_status(job).value}")


def _files_to_send(folder: Path) -> dict[str, int]:
    """Relative path and bytes of every file that Ray will send, found by Ray's own walk."""
    from ray._private.runtime_env import packaging

    found: dict[str, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            found[str(path.relative_to(folder))] = path.stat().st_size

    use_gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    silent = logging.getLogger("submit.silent")
    silent.disabled = True
    excludes = [packaging._get_excludes(folder, EXCLUDES)]
    packaging._dir_travel(folder, excludes, note, use_gitignore, silent)
    return found


async def _follow(client: Any, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        log.output(lines, end="")


if __name__ == "__main__":
    sys.exit(main())
