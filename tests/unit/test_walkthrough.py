"""Every function that docs/walkthrough.md names exists where the page says."""

from __future__ import annotations

import ast
import re

import pytest

from tests.support import REPOSITORY

TEXT = (REPOSITORY / "docs" / "walkthrough.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`([\w/]+\.py):([\w.]+)`", TEXT)))


def names_of(body: list[ast.stmt], prefix: str = "") -> set[str]:
    """Functions and classes, with the methods and attributes of the classes."""
    found = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(prefix + node.name)
        if isinstance(node, ast.ClassDef):
            found |= names_of(node.body, f"{prefix}{node.name}.")
    return found


@pytest.mark.parametrize(("file", "name"), NAMED, ids=lambda part: part)
def test_a_function_of_the_page_exists(file: str, name: str) -> None:
    path = REPOSITORY / "cnn2gnn_dist" / file
    assert path.is_file()
    assert name in names_of(ast.parse(path.read_text(encoding="utf-8")).body)


def test_the_page_names_its_functions_in_full() -> None:
    """Everything that looks like a file or a function of one is written in the form that is checked."""
    assert len(NAMED) > 50
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"(?s)```.*?```", "", TEXT))
    bare = [span for span in spans if re.fullmatch(r"[\w/]+\.py", span)]
    assert [span for span in bare if not (REPOSITORY / span).is_file()] == []
    classes = {name.split(".")[0] for _, name in NAMED}
    for span in spans:
        dotted = re.fullmatch(r"([A-Z]\w+)\.(\w+)", span)
        assert dotted is None or dotted[1] in classes, span
