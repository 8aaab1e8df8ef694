"""Submit a run to a Ray cluster's job server, follow its log, return its exit code.

python launch/submit.py --address http://127.0.0.1:8265 -- --config demo run.dir=/shared/demo

Everything after ``--`` goes to ``cnn2gnn run`` on the cluster. Ctrl-C leaves the job
running and says how to look at it; ``--stop-on-interrupt`` stops it instead.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
import uuid
from pathlib import Path

from ray.job_submission import JobStatus, JobSubmissionClient

REPOSITORY = Path(__file__).resolve().parent.parent
EXCLUDES = [".git", "runs", ".venv", "**/*.tar", "**/__pycache__"]


def main() -> int:
    """Submit, follow, report; 0 when the job succeeded, 1 otherwise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--address", default="http://127.0.0.1:8265", help="the job server")
    parser.add_argument(
        "--working-dir", default=str(REPOSITORY), help="what is sent to the cluster"
    )
    parser.add_argument("--stop-on-interrupt", action="store_true", help="Ctrl-C stops the job")
    parser.add_argument("arguments", nargs="*", help="arguments of `cnn2gnn run`, after --")
    options = parser.parse_args()
    try:
        client = JobSubmissionClient(options.address)
    except (ConnectionError, RuntimeError) as error:
        print(f"submit.py: no job server answers at {options.address}: {error}", file=sys.stderr)
        print("  remedy: `ray start --head`, or mend --address", file=sys.stderr)
        return 2
    job = client.submit_job(
        submission_id=f"cnn2gnn-{uuid.uuid4().hex[:8]}",
        entrypoint="python -m cnn2gnn_dist run " + shlex.join(options.arguments),
        runtime_env={"working_dir": options.working_dir, "excludes": EXCLUDES},
    )
    print(f"submitted {job}", flush=True)
    try:
        asyncio.run(_follow(client, job))
    except KeyboardInterrupt:
        if options.stop_on_interrupt:
            client.stop_job(job)
            print(f"stopped {job}")
        else:
            print(f"{job} goes on; `ray job logs {job} --follow` shows it")
        return 130
    status = client.get_job_status(job)
    print(f"{job}: {status.value}")
    return 0 if status == JobStatus.SUCCEEDED else 1


async def _follow(client: JobSubmissionClient, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
