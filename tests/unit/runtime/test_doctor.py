"""The doctor: every check, with its message when something is wrong and its silence otherwise."""

from __future__ import annotations

import collections
import importlib.metadata
import os
import resource
import shutil
import socket
import sys

import pytest

from cnn2gnn_dist.commands.doctor import machine as doctor
from cnn2gnn_dist.commands.doctor.machine import FAIL, OK, WARN, Finding
from tests.support.ports import free_port

Usage = collections.namedtuple("Usage", "total used free")


def only(monkeypatch, *findings: Finding) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: list(findings))


def test_a_warning_has_a_remedy_and_stops_nothing(monkeypatch, capsys):
    only(monkeypatch, Finding("disk", WARN, "2 GiB free", "run.dir= elsewhere"))
    assert doctor.command() == 0
    assert "-> run.dir= elsewhere" in capsys.readouterr().out


def test_a_failure_is_exit_code_1(monkeypatch, capsys):
    only(monkeypatch, Finding("python", OK, "3.11", "no"), Finding("dgl", FAIL, "gone", "pip …"))
    assert doctor.command() == 1
    said = capsys.readouterr().out
    assert "-> pip …" in said
    assert "-> no" not in said
    assert "1 problem" in said


def installed(monkeypatch, wanted: list[str], versions: dict[str, str]) -> dict[str, Finding]:
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "requires", lambda _: wanted)
    monkeypatch.setattr(importlib.metadata, "version", version)
    return {finding.name: finding for finding in doctor._versions()}


def test_versions_against_the_ranges(monkeypatch):
    found = installed(
        monkeypatch,
        ["torch>=2.11,<2.14", "dgl==2.1.0", "ray[default]>=2.60", "pytest>=8; extra == 'test'"],
        {"torch": "2.13.0+cpu", "dgl": "2.4.0"},
    )
    assert {name: one.status for name, one in found.items()} == {
        "torch": OK, "dgl": FAIL, "ray": FAIL,
    }  # fmt: skip
    assert '"dgl==2.1.0"' in found["dgl"].remedy
    assert found["ray"].seen == "not installed"


def test_a_checkout_that_is_not_installed_is_held_to_its_pyproject(monkeypatch, tmp_path):
    def nobody(_: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "requires", nobody)
    assert {"torch", "dgl", "ray"} <= {finding.name for finding in doctor._versions()}
    monkeypatch.setattr(doctor, "CHECKOUT", tmp_path / "none.toml")
    (finding,) = doctor._versions()
    assert finding.status == WARN
    assert finding.remedy == "pip install '.[all]'"


def test_python_of_another_version(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    assert doctor._python().status == FAIL


@pytest.mark.parametrize(("free", "status"), [(6, OK), (3, WARN), (0.5, FAIL)])
def test_disk(monkeypatch, free, status):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free * doctor.GIB))
    assert doctor._disk().status == status


@pytest.mark.parametrize(("free", "status"), [(2, OK), (0.06, WARN)])
def test_shared_memory(monkeypatch, free, status):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free * doctor.GIB))
    assert doctor._shared_memory().status == status


@pytest.mark.parametrize(("limit", "status"), [(65536, OK), (256, WARN)])
def test_open_files(monkeypatch, limit, status):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    assert doctor._open_files().status == status


@pytest.mark.parametrize(
    ("value", "status"), [(None, OK), ("1", OK), ("100", WARN), ("0", WARN), ("many", WARN)]
)
def test_threads(monkeypatch, value, status):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if value is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert doctor._threads().status == status


@pytest.mark.parametrize("scheme", ["", "http://"])
def test_ray_is_told_where_it_would_connect_and_that_nobody_is_there(monkeypatch, scheme):
    address = f"{scheme}127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    found = doctor._ray()
    assert found.status == WARN
    assert f"RAY_ADDRESS={address}" in found.seen
    assert "answers at" in found.seen
    monkeypatch.delenv("RAY_ADDRESS")
    assert doctor._ray().status == OK


def test_a_home_that_cannot_be_written_to(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert doctor._home().status == OK
    monkeypatch.setenv("HOME", str(tmp_path / "none"))
    assert doctor._home().status == WARN


def test_interfaces(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    assert doctor._interfaces().status == OK
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=nothing9")
    found = doctor._interfaces()
    assert found.status == FAIL
    assert "unset NCCL_SOCKET_IFNAME" in found.remedy
    assert doctor._loopback().status == OK


def test_the_launchers_port(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(doctor, "DEFAULT_PORT", taken.getsockname()[1])
        found = doctor._port()
    assert found.status == WARN
    assert f"--master_port {doctor.DEFAULT_PORT + 1}" in found.remedy
    assert doctor._port().status == OK


def test_deepspeed_leaves_the_environment_as_it_was(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert doctor._deepspeed().status == OK
    assert "DS_ACCELERATOR" not in os.environ


def test_what_libraries_print_is_kept_out_and_the_streams_come_back(monkeypatch, capfd):
    def loud() -> Finding:
        os.write(1, b"a banner\n")
        os.write(2, b"a note of C code\n")
        raise OSError("libcudart.so is missing")

    monkeypatch.setattr(doctor, "_dgl", loud)
    found = {finding.name: finding for finding in doctor.examine()}
    os.write(1, b"after\n")
    said = capfd.readouterr()
    assert said.out == "after\n"
    assert said.err == ""
    assert found["dgl imports"].status == FAIL
    assert "libcudart" in found["dgl imports"].seen
