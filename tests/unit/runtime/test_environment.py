"""How users' environments affect startup: each is supported, or refused at once with a remedy."""

from __future__ import annotations

import errno
import http.server
import resource
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.runtime import ranks
from cnn2gnn_dist.runtime.group import rendezvous
from cnn2gnn_dist.runtime.group.process_group import device_index, join
from cnn2gnn_dist.runtime.hosts import host_checks
from cnn2gnn_dist.runtime.ranks import Ranks, first_host
from cnn2gnn_dist.runtime.ray import probe as ray_probe
from tests.support.ports import free_port

# --- ranks and rendezvous ----------------------------------------------------------------------


def slurm(**more: str) -> Ranks:
    step = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8"}
    return Ranks.from_environment(step | more)


def test_srun_needs_no_master_address():
    nodes = {"SLURM_STEP_NODELIST": "gpu[003-004],cpu9", "SLURM_STEP_NUM_NODES": "3"}
    found = slurm(**nodes, SLURM_JOB_ID="4711")
    assert (found.rank, found.local_rank, found.world_size) == (5, 1, 8)
    assert found.master_addr == "gpu003"
    assert found.master_port == slurm(**nodes, SLURM_JOB_ID="4711", SLURM_PROCID="0").master_port
    assert found.master_port != slurm(**nodes, SLURM_JOB_ID="4712").master_port
    assert slurm(**nodes, MASTER_ADDR="10.1.2.3", MASTER_PORT="777").master_addr == "10.1.2.3"
    assert slurm(**nodes, MASTER_PORT="777").master_port == 777
    assert slurm(SLURM_STEP_NODELIST="gpu003", SLURM_STEP_NUM_NODES="1").master_addr == "127.0.0.1"
    assert slurm().master_addr == "127.0.0.1"


def test_srun_over_nodes_that_it_does_not_name_is_refused():
    with pytest.raises(UserError, match="SLURM_STEP_NODELIST") as caught:
        slurm(SLURM_STEP_NUM_NODES="2")
    assert "export MASTER_ADDR" in caught.value.remedy


@pytest.mark.parametrize(
    ("listed", "first"),
    [
        ("n1", "n1"),
        ("a,b", "a"),
        ("gpu[003-007,9],cpu1", "gpu003"),
        ("gpu[9,3-7]", "gpu9"),
        ("rack[2]n[10-12]", "rack2n10"),
        ("a-[1-3]-x[5,6],b", "a-1-x5"),
    ],
)
def test_first_of_a_slurm_host_list(listed, first):
    assert first_host(listed) == first


def test_an_invalid_port_is_refused():
    env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "70000"}
    with pytest.raises(UserError, match="no port 70000"):
        Ranks.from_environment(env)


def test_a_task_that_sees_one_gpu_takes_it_whatever_its_number():
    assert [device_index(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    assert device_index(5, 1) == 0
    with pytest.raises(UserError, match="it sees only 2") as caught:
        device_index(2, 2)
    assert "--gpus-per-task=1" in caught.value.remedy


@pytest.mark.parametrize(
    ("backend", "wanted", "unknown"),
    [
        ("gloo", "", []),
        ("gloo", "lo", []),
        ("gloo", "eth9,lo", ["eth9"]),
        ("gloo", "eth", ["eth"]),  # gloo takes complete names
        ("nccl", "eth", []),  # NCCL takes prefixes,
        ("nccl", "ib,eth", []),  # whichever exist,
        ("nccl", "=eth", ["eth"]),  # or complete names,
        ("nccl", "^docker", []),  # or all except some
        ("nccl", "ib,en", ["ib", "en"]),
        ("nccl", "eth0:1", []),
    ],
)
def test_network_interfaces_that_are_not_there(backend, wanted, unknown):
    assert rendezvous.unknown_interfaces(backend, wanted, ["eth0", "lo"]) == unknown


def test_the_message_names_variable_and_interfaces():
    with pytest.raises(UserError, match="GLOO_SOCKET_IFNAME names no network interface") as caught:
        rendezvous.check_interfaces("gloo", {"GLOO_SOCKET_IFNAME": "eth9"})
    assert "lo" in caught.value.remedy.split("one of: ")[1].split(", ")


def test_the_ranks_meet_on_their_address_alone():
    port = free_port()
    with rendezvous.listen(Ranks(0, 0, 2, "127.0.0.1", port)) as listening:
        assert listening.getsockname() == ("127.0.0.1", port)
        with pytest.raises(UserError, match=rf"port {port}.* is in use") as caught:
            rendezvous.listen(Ranks(0, 0, 2, "localhost", port))
        assert "MASTER_PORT" in caught.value.remedy


def test_a_reserved_port_is_nobody_elses_until_it_is_used():
    port = rendezvous.reserve("127.0.0.1")
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    with rendezvous.listen(Ranks(0, 0, 2, "127.0.0.1", port)) as listening:
        assert listening.getsockname() == ("127.0.0.1", port)


def test_an_address_of_another_host_is_met_on_all_interfaces_with_a_note(capsys, console):
    with rendezvous.listen(Ranks(0, 0, 2, "192.0.2.77", free_port())) as listening:
        assert listening.getsockname()[0] == "0.0.0.0"
    assert "MASTER_ADDR=192.0.2.77 is not an address" in capsys.readouterr().err


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_nobody_else_joins(rank):
    """For example because RANK and WORLD_SIZE were left over in a shell."""
    lonely = Ranks(rank, rank, 2, "127.0.0.1", free_port())
    with pytest.raises(UserError, match=f"rank {rank} of 2 could not meet the others") as caught:
        join(lonely, torch.device("cpu"), timedelta(seconds=1))
    assert "unset RANK and WORLD_SIZE" in caught.value.remedy
    assert not torch.distributed.is_initialized()


# --- requirements of this machine --------------------------------------------------------------


def test_too_many_ranks_for_cores_or_memory():
    host_checks.check_cores(16, 2)
    with pytest.raises(UserError, match="17 ranks on 2 cores") as caught:
        host_checks.check_cores(17, 2)
    assert "run.ranks=2" in caught.value.remedy
    host_checks.check_memory(3, host_checks.RAY_BYTES + 3 * host_checks.RANK_BYTES)
    with pytest.raises(UserError, match="4 ranks need about") as caught:
        host_checks.check_memory(4, host_checks.RAY_BYTES + 4 * host_checks.RANK_BYTES - 1)
    assert "run.ranks=3" in caught.value.remedy


def test_too_few_open_files(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 4096))  # Ray raises the soft limit
    host_checks.check_files()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, host_checks.LEAST_FILES - 1))
    with pytest.raises(UserError, match="Ray needs"):
        host_checks.check_files()


def test_shared_memory_that_cannot_be_written(monkeypatch):
    host_checks.check_shared_memory()
    monkeypatch.setattr(host_checks, "SHARED_MEMORY", Path("/proc"))
    with pytest.raises(UserError, match="nothing can be written to /proc"):
        host_checks.check_shared_memory()


def test_a_folder_that_has_gone_stale(monkeypatch, tmp_path):
    """As a mount whose server was set up anew: not even whether it is a folder can be asked."""

    def stale(self):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "is_dir", stale)
    with pytest.raises(UserError, match="can't be accessed: Stale file handle") as caught:
        host_checks.check_room(tmp_path, 1, "another folder")
    assert caught.value.where == str(tmp_path)


# --- a cluster's address -----------------------------------------------------------------------


@pytest.fixture
def web() -> Iterator[str]:
    """A listening server that is neither a cluster's head nor a job server."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("named", ["cluster.address", "RAY_ADDRESS"])
def test_a_dead_address_is_refused_by_the_name_of_its_setting(named):
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match="no Ray cluster answers") as caught:
        ray_probe.cluster_mode(address, f"{named}={address}")
    assert caught.value.where == f"{named}={address}"
    assert ("unset RAY_ADDRESS" in caught.value.remedy) == (named == "RAY_ADDRESS")


def test_what_is_not_a_cluster_is_reported_as_such(web):
    with pytest.raises(UserError, match="is not the head of a Ray cluster"):
        ray_probe.cluster_mode(web, "cluster.address")
    with pytest.raises(UserError, match=r"no job server answers .* 404"):
        ray_probe.job_server_mode(f"http://{web}", "--address")
    with pytest.raises(UserError, match="has the form HOST:6379") as caught:
        ray_probe.cluster_mode(f"http://{web}", "cluster.address")
    assert "launch/submit.py" in caught.value.remedy
    with pytest.raises(UserError, match="has the form http://HOST:8265"):
        ray_probe.job_server_mode(web, "--address")


@pytest.mark.parametrize(
    ("address", "parts"),
    [("h:1", ("h", 1)), ("h", ("h", 6379)), ("[::1]:7", ("::1", 7)), ("10.0.0.1:6379", ("10.0.0.1", 6379))],
)  # fmt: skip
def test_host_and_port(address, parts):
    assert ray_probe.host_and_port(address, "") == parts


@pytest.mark.parametrize("address", ["h:port", "ray://h:1", "h:99999", ":1"])
def test_invalid_addresses(address):
    with pytest.raises(UserError, match="has the form HOST:6379"):
        ray_probe.host_and_port(address, "")


def test_a_token_is_looked_for_where_ray_does(tmp_path):
    home = {"HOME": str(tmp_path)}
    assert ray_probe.own_token(home) == ""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of home\n")
    (tmp_path / "other").write_text("of path")
    path = home | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "other")}
    named = path | {"RAY_AUTH_TOKEN": "of variable"}
    found = [(ray_probe.own_token(env), ray_probe.token_source(env)) for env in (home, path, named)]
    assert found == [
        ("of home", str(tmp_path / ".ray" / "auth_token")),
        ("of path", str(tmp_path / "other")),
        ("of variable", "RAY_AUTH_TOKEN"),
    ]


def test_ranks_do_not_meet_at_a_host_name_that_resolves_to_loopback(monkeypatch):
    """As Debian's 127.0.1.1: other hosts reach rank 0 at the address of an interface."""
    monkeypatch.setattr(ranks.socket, "gethostbyname", lambda name: "127.0.1.1")
    monkeypatch.setattr(ranks, "first_address", lambda: "192.0.2.5")
    assert Ranks(0, 0, 2, "node-a").meeting_address() == "192.0.2.5"
    assert Ranks(0, 0, 2, "localhost").meeting_address() == "localhost"
    monkeypatch.setattr(ranks, "first_address", lambda: None)
    assert Ranks(0, 0, 2, "node-a").meeting_address() == "node-a"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # all ranks on this host: loopback will do
    monkeypatch.setattr(ranks, "first_address", lambda: "192.0.2.5")
    assert Ranks(0, 0, 2, "node-a").meeting_address() == "node-a"
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(ranks.socket, "gethostbyname", lambda name: "192.0.2.9")
    assert Ranks(0, 0, 2, "node-a").meeting_address() == "node-a"
