"""Start a driver, end it as specified, and report what is left of it: ``python reaper.py JOB.json``.

This process is the subreaper of everything that the driver starts: orphans become its children, so
none escapes, and unrelated processes are not counted. ``listening`` reports the addresses on which they
listen when the trigger occurs. With ``private`` it runs in a separate mount namespace with its own
/dev/shm. The job: ``command``, ``environment``, ``signal`` (a number or null, sent when a line of the
driver contains ``trigger`` and processes of the ``awaited`` names have started), ``seconds`` to wait for these and
for what is left, ``private``, ``result`` (a path).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    if job["private"]:
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], check=True)
    shared = set(os.listdir("/dev/shm"))
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    driver = subprocess.Popen(
        job["command"],
        env=job["environment"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert driver.stdin is not None
    assert driver.stdout is not None
    seen, started, listening = [], [], []
    for line in driver.stdout:
        seen.append(line)
        if not started and job["trigger"] in line:
            children, started = _started(job["awaited"], job["seconds"])
            listening = [address for child in children for address in _listening(child)]
            if job["signal"] is not None:
                os.kill(driver.pid, job["signal"])
            driver.stdin.close()  # a driver waits for this before it ends: what is listed above was alive
    code = driver.wait()
    left = _left(job["seconds"])
    result = {"code": code, "output": "".join(seen), "started": started, "left": left}
    result["listening"] = listening
    result["shared"] = sorted(set(os.listdir("/dev/shm")) - shared)
    Path(job["result"]).write_text(json.dumps(result))


def _started(awaited: list[str], seconds: float) -> tuple[list[psutil.Process], list[str]]:
    """The processes below this one, and their names, when the awaited ones are among them or time is up."""
    deadline = time.monotonic() + seconds
    while True:
        children = psutil.Process().children(recursive=True)
        names = [_name(child) for child in children]
        said = " ".join(names)
        if all(part in said for part in awaited) or time.monotonic() > deadline:
            return children, names
        time.sleep(0.1)


def _left(seconds: float) -> list[str]:
    """Names of the processes still alive after ``seconds``, which are then killed."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(ChildProcessError):  # reap as init does, or zombies remain
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        children = psutil.Process().children(recursive=True)
        if not children:
            return []
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    names = [_name(child) for child in children]
    for child in children:
        with contextlib.suppress(psutil.Error):
            child.kill()
    return names


def _listening(process: psutil.Process) -> list[str]:
    try:
        sockets = process.net_connections("inet")
    except psutil.Error:
        return []
    addresses = [one.laddr.ip for one in sockets if one.status == psutil.CONN_LISTEN]
    return [address.removeprefix("::ffff:") for address in addresses]  # IPv4 through an IPv6 socket


def _name(process: psutil.Process) -> str:
    try:
        return f"{process.name()}: {' '.join(process.cmdline())[:120]}"
    except psutil.Error:
        return "?"


if __name__ == "__main__":
    main()
