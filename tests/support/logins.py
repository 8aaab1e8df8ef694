"""Logins by ssh among hosts of ``tests.support.hosts``, with a key of their own: Debian's client and server."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.support.hosts import Host

PROGRAMS = ("ssh", "sshd", "ssh-keygen")
SERVER = """\
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PidFile none
PermitRootLogin yes
StrictModes no
UsePAM no
"""
CLIENT = """\
Host *
  IdentityFile {folder}/key
  UserKnownHostsFile {folder}/known
  StrictHostKeyChecking accept-new
  BatchMode yes
"""


def allow(members: Sequence[Host], folder: Path, home: Path | None = None) -> None:
    """Let these hosts log in to each other by a key of this test, of which the user's own files know nothing.

    Args:
        members: the hosts.
        folder: which all of them see, for the keys.
        home: the home folder of whoever logs in, instead of the user's own, which all hosts share.
    """
    subprocess.run(["ssh-keygen", "-q", "-N", "", "-f", str(folder / "key")], check=True)
    more = "" if home is None else f"SetEnv HOME={home}\n"
    for name, text in (("server", SERVER + more), ("client", CLIENT)):
        (folder / name).write_text(text.format(folder=folder))
    for host in members:
        host.mount(folder / "client", Path("/etc/ssh/ssh_config"))
        host.shell(f"mkdir -p /run/sshd; $(which sshd) -f {folder}/server")
    for host in members:  # it listens only after its first process has ended
        listens = "until ss -H --listening --tcp 'sport = :22' | grep -q .; do sleep 0.1; done"
        host.shell(f'timeout 120 sh -c "{listens}"')
