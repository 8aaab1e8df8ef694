"""Names of config fields in messages, docstrings, comments and docs are current field names."""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from cnn2gnn_dist import field_names
from cnn2gnn_dist.config import Config
from tests.support import REPOSITORY

SECTIONS = [n for n, f in Config.model_fields.items() if field_names.is_section(f.annotation)]
NAME = re.compile(
    # Not part of a path, an attribute of something else, a shell variable, a call or a file name.
    rf"(?<![\w./\-$*{{])(?:{'|'.join(SECTIONS)})(?:\.[a-z_][a-z0-9_]*)+(?![\w(/]|\.\w)"
)
KNOWN = set(field_names.paths())
MAPPINGS = ("teacher.args.", "student.stem_args.", "teacher.ds_config.", "student.ds_config.")
FILES = (".md", ".npz", ".dgl", ".safetensors")
OTHERS = {
    "model.classes_": "of a Classifier, in an example",
    "model.predict_together": "of a Classifier, in a sentence",
    "run.left_out_at_pack": "of results.json",
    "stream.epoch": "an attribute, in an example",
    "stream.py": "a file",
    "views.seed": "an attribute of ViewSpec",
}
"""Names that look like fields but are something else."""
OLD = {"cnn2gnn_dist/field_names.py", "cnn2gnn_dist/pipeline/key_defaults.py", "CHANGELOG.md"}
"""Files about names that used to exist, or never existed."""

SOURCES = sorted(
    path
    for folder, pattern in (
        ("cnn2gnn_dist", "**/*.py"),
        ("cnn2gnn_dist/presets", "*.yaml"),
        ("launch", "*.py"),
        ("benchmarks", "**/*.py"),
        ("docs", "*.md"),  # those of docs/reference name modules
        ("", "*.md"),
    )
    for path in (REPOSITORY / folder).glob(pattern)
    if str(path.relative_to(REPOSITORY)) not in OLD
)


@functools.cache
def texts(path: Path) -> tuple[str, ...]:
    """All text in a file that people read; in a module, its strings, docstrings and comments."""
    return tuple(_texts(path))


def _texts(path: Path) -> Iterator[str]:
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield source
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def unknown(text: str) -> set[str]:
    """Names that look like a config field but are not one."""
    found = {name for name in NAME.findall(text) if not name.endswith(FILES)}
    return {n for n in found - KNOWN - OTHERS.keys() if not n.startswith(MAPPINGS)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_a_field_that_is_named_is_there(path):
    assert {name for text in texts(path) for name in unknown(text)} == set()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("set student.scope, or graph.scope", {"student.scope"}),
        ("graph.exact=false is graph.search.exact=false now", {"graph.exact"}),
        ("`student.k`", {"student.k"}),
        ("teacher.epochs=3 student.epoch.", {"student.epoch"}),
        (
            "teacher.args.drop_rate=0.1, cnn2gnn_dist.graph.sampler, runs/student.x, graph.py()",
            set(),
        ),
        ("graph.nodes(), {run.name}, self.graph.x, see stream.md", set()),
        ("graph.sampling.fanouts[0], data.train='[a]'", set()),
    ],
)
def test_what_is_taken_for_the_name_of_a_field(text, found):
    assert unknown(text) == found


def test_there_are_names_to_check_and_exceptions_occur():
    whole = [text for path in SOURCES for text in texts(path)]
    found = {name for text in whole for name in NAME.findall(text)}
    assert len(found & KNOWN) > 60
    assert OTHERS.keys() <= found
