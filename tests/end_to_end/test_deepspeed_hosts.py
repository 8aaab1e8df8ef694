"""The DeepSpeed launcher on two hosts: by ssh, with its own environment file, and without ssh."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support import hosts, logins
from tests.support.hosts import Host
from tests.support.ports import free_port
from tests.support.runs import BIN, MICRO, environment, finish

pytestmark = hosts.needed("pdsh", *logins.PROGRAMS)

ARGUMENTS = ["launch/train.py", "--config", "demo", *MICRO, "teacher.epochs=1", "device=cpu"]


def with_a_login(pair: tuple[Host, ...], folder: Path) -> None:
    (folder / "hostfile").write_text("".join(f"{host.name} slots=1\n" for host in pair))
    logins.allow(pair, folder)


folder, pair = hosts.fixtures(with_a_login)


def launcher(folder: Path, pair: tuple[Host, ...]) -> list[str]:
    place = ["--master_addr", pair[0].address, "--master_port", str(free_port())]
    return [str(BIN / "deepspeed"), "--hostfile", str(folder / "hostfile"), *place]


def test_by_ssh(folder, pair):
    (folder / "variables").write_text(f"RUNS={folder}\nOMP_NUM_THREADS=1\n")
    ours = environment(DS_ENV_FILE=str(folder / "variables"), HOME="/tmp/home")
    command = [*launcher(folder, pair), *ARGUMENTS, "run.dir=$RUNS/ssh"]
    code, output = finish(pair[0].start([*command, "--stages=pack,index,teacher"], ours))
    assert code == 0, output[-4000:]
    for host in pair:
        assert f"{host.name}: " in output
    assert json.loads((folder / "ssh/teacher/done.json").read_text())


def test_without_ssh(folder, pair):
    command, started = launcher(folder, pair), []
    for number, host in enumerate(pair):
        own = [*command, "--no_ssh", "--node_rank", str(number), *ARGUMENTS]
        own += [f"run.dir={folder}/no-ssh", "--stages=pack,index,teacher"]
        started.append(host.start(own, environment(HOME="/tmp/home")))
    for process in started:
        code, output = finish(process)
        assert code == 0, output[-4000:]
    assert json.loads((folder / "no-ssh/teacher/done.json").read_text())
