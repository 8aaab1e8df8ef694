"""What several nodes report about themselves: the table, and each problem with its remedy."""

from __future__ import annotations

import dataclasses
import errno
import shutil
import threading
from pathlib import Path

import pytest

from cnn2gnn_dist.commands.doctor import cluster as cluster_doctor
from cnn2gnn_dist.runtime.hosts import host_checks, node_survey
from cnn2gnn_dist.runtime.hosts.node_survey import GIB, MIB, Node, Peer

VERSIONS = {"python": "3.11.7", "cnn2gnn": "0.1.0", "torch": "2.13.0", "ray": "2.60.0"}


def node(letter: str, **more: object) -> Node:
    good = Node(
        host=f"node-{letter}",
        address=f"10.0.0.{ord(letter) - 96}",
        interface="eth0",
        versions=dict(VERSIONS),
        gpus=["NVIDIA H100"] * 8,
        cores=64,
        memory=200 * GIB,
        shared_memory=60 * GIB,
        disk=900 * GIB,
        rate=1000 * MIB,
    )
    return dataclasses.replace(good, **more)


def test_good_nodes_have_no_problems(capsys):
    assert cluster_doctor.report([node("a"), node("b")], {}, "/shared") == 0
    title, first, second, _, last = capsys.readouterr().out.splitlines()
    assert title.split()[:3] == ["host", "address", "interface"]
    assert first.split()[:3] == ["node-a", "10.0.0.1", "eth0"]
    assert "8 NVIDIA H100" in second
    assert last == "2 nodes, no problems found"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"versions": VERSIONS | {"torch": "2.12.1"}},
            "node-b: torch 2.12.1, but 2.13.0 on node-a",
        ),
        ({"versions": VERSIONS | {"ray": ""}}, "node-b: ray is missing, but 2.60.0 on node-a"),
        ({"gpus": ["NVIDIA H100"] * 4}, "node-b: 4 GPUs, but 8 on node-a"),
        ({"address": "127.0.1.1"}, "node-b: its address is 127.0.1.1, which no other node can"),
        ({"shared": "can't be written: Read-only"}, "node-b: /shared can't be written: Read-only"),
        ({"unreachable": "10.0.0.1: timed out"}, "node-b can't reach 10.0.0.1: timed out"),
        ({"rate": 1.5 * MIB}, "node-b: only 1.5 MiB/s from the next node"),
        ({"offset_s": -7.25}, "node-b: its clock is off by -7.2 s from node-a's"),
        ({"shared_memory": 64 * MIB}, "node-b: 0.1 GiB free of /dev/shm, of the 1 needed"),
        ({"disk": 0}, "node-b: 0.0 GiB free of disk, of the 5 needed"),
    ],
)
def test_a_problem_is_a_line_with_its_host_and_a_remedy(wrong, said, capsys):
    assert cluster_doctor.report([node("a"), node("b", **wrong)], {}, "/shared") == 1
    output = capsys.readouterr().out
    assert output.count("FAIL  ") == output.count("-> ") == 1
    assert f"FAIL  {said}" in output


@pytest.mark.parametrize(
    ("folder", "wrong", "said"),
    [("/shared", "", "yes"), ("/shared", "is another folder", "no"), (None, "", "-")],
)
def test_a_folder_is_called_shared_only_where_one_was_looked_for(folder, wrong, said):
    title, *rows = node_survey.table([node("a"), node("b", shared=wrong)], folder).splitlines()
    at = title.index("shared")
    assert rows[1][at:].split()[0] == said


def test_a_node_without_an_answer_is_a_problem(capsys):
    failed = {"10.0.0.3": "No module named 'cnn2gnn_dist'"}
    assert cluster_doctor.report([node("a")], failed, None) == 1
    output = capsys.readouterr().out
    assert "10.0.0.3 did not answer: No module named 'cnn2gnn_dist'" in output
    assert "--send-package" in output
    assert "2 nodes, 1 problems found" in output


def test_no_node_answers(capsys):
    failed = {"10.0.0.3": "No module named 'cnn2gnn_dist'"}
    assert cluster_doctor.report([], failed, "/shared") == 1
    assert "1 nodes, 1 problems found" in capsys.readouterr().out


def test_a_shared_folder_whose_server_does_not_answer(tmp_path, monkeypatch):
    """Calls into it never return; the doctor says so."""
    back, real = threading.Event(), shutil.disk_usage
    monkeypatch.setattr(host_checks, "ANSWER_S", 0.1)

    def usage(path):
        if path == tmp_path:
            back.wait()
        return real(path)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.setattr(node_survey, "_gpus", list)
    found = node_survey.look("127.0.0.1", str(tmp_path))
    back.set()
    assert found.shared == "has not answered for 0.1 s"


def test_a_shared_folder_that_has_gone_stale(tmp_path, monkeypatch):
    def stale(self):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "exists", stale)
    assert node_survey.find_probe(str(tmp_path / "x")) == "can't be accessed: Stale file handle"


def test_nodes_measure_each_other():
    peer = Peer("127.0.0.1", "secret")
    here = node("a", rate=0.0, offset_s=9.0)
    node_survey.measure(here, "secret", ("127.0.0.1", peer.port), ("127.0.0.1", peer.port))
    assert here.unreachable == ""
    assert here.rate > 0
    assert abs(here.offset_s) < 1
    node_survey.measure(here, "wrong.", ("127.0.0.1", peer.port), ("127.0.0.1", peer.port))
    assert "127.0.0.1: " in here.unreachable
    peer.close()


def test_a_probe_is_found_where_the_folder_is_shared(tmp_path):
    path, wrong = node_survey.write_probe(str(tmp_path / "new"))
    assert wrong == ""
    assert node_survey.find_probe(path) == ""
    assert len(list((tmp_path / "new").iterdir())) == 1
    assert "another folder" in node_survey.find_probe(f"{path}-not", seconds=0)
    (tmp_path / "file").write_text("")
    assert node_survey.write_probe(str(tmp_path / "file" / "sub"))[1].startswith("can't be written")
