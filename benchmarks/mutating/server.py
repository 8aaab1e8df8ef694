"""Run tests against one mutant after another, each in a fork of a process with the libraries loaded.

python benchmarks/mutating/server.py MODULE_FILE TESTS…   in a copy of the repository. Each line
on stdin is JSON {"source": …, "seconds": …}; each on stdout is "passed", "failed", "timeout" or
"broken" (no test ran), and the seconds.
"""

from __future__ import annotations

import compileall
import contextlib
import importlib
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path

LIBRARIES = ("torch", "pyarrow.parquet", "hypothesis", "safetensors.torch", "sklearn.metrics",
             "PIL.Image", "psutil", "pydantic", "yaml", "tqdm", "faiss", "deepspeed")  # fmt: skip
LOADED = "modules.json"
"""Modules that the tests imported when they ran on the unmodified file."""
PASSED, FAILED = 0, 1  # pytest's exit codes


def main() -> None:
    """Answer until stdin ends."""
    module, tests = Path(sys.argv[1]), sys.argv[2:]
    out = os.fdopen(os.dup(1), "w")
    quiet = os.open(os.devnull, os.O_RDWR)
    os.dup2(quiet, 1)
    os.dup2(os.open("pytest.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    compileall.compile_dir(".", quiet=2)
    # The benchmarks folder was first; now the copy and its tests must be.
    sys.path[0] = os.getcwd()
    import pytest

    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            __import__(name)
    first = True
    for line in sys.stdin:
        job = json.loads(line)
        module.write_text(job["source"], encoding="utf-8")
        began = time.monotonic()
        sys.dont_write_bytecode = not first  # a mutant must not leave bytecode behind
        child = os.fork()
        if child == 0:
            os.setsid()
            options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", *tests]
            code = 99
            try:
                code = int(pytest.main(options))
                if first:
                    Path(LOADED).write_text(json.dumps(list(sys.modules)), encoding="utf-8")
            finally:
                os._exit(code)
        outcome = _wait(child, job["seconds"])
        print(json.dumps([outcome, round(time.monotonic() - began, 1)]), file=out, flush=True)
        if first and outcome == "passed":
            Path(importlib.util.cache_from_source(str(module))).unlink(missing_ok=True)
            _load_what_no_mutant_changes(module)
        first = False


def _load_what_no_mutant_changes(module: Path) -> None:
    """Import what the tests imported, except for what imports the mutated file and the tests' own modules."""
    import grimp

    package = module.parts[module.parts.index("cnn2gnn_dist") :]
    mutated = ".".join(package).removesuffix(".py")
    graph = grimp.build_graph("cnn2gnn_dist")
    changing = {mutated, *graph.find_downstream_modules(mutated)}
    for name in json.loads(Path(LOADED).read_text(encoding="utf-8")):
        # This also imports the packages above, which import no module of ours themselves.
        if name in changing or name.split(".")[0] == "tests":
            continue
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def _wait(child: int, seconds: float) -> str:
    """Wait for the outcome of the tests; kill everything that they started."""
    handle = os.pidfd_open(child)
    try:
        import select

        ready, _, _ = select.select([handle], [], [], seconds)
    finally:
        os.close(handle)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not ready:
        return "timeout"
    if not os.WIFEXITED(status):
        return "failed"  # the mutant ended the process
    code = os.WEXITSTATUS(status)
    # 2: an import failed while tests were collected, which the mutant also caused.
    return {PASSED: "passed", FAILED: "failed", 2: "failed"}.get(code, "broken")


if __name__ == "__main__":
    main()
