"""The worked examples of CONTRIBUTING.md: each diff applies to the code as it is."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import examples

FOUND = examples.examples(examples.PAGE.read_text(encoding="utf-8"))


def test_there_is_one_for_each_kind_of_part():
    assert len(FOUND) == 5


@pytest.mark.parametrize("example", FOUND, ids=lambda one: one.title)
def test_a_diff_applies(example):
    command = ["git", "apply", "--check", "-"]
    done = subprocess.run(
        command, input=example.diff, cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
