"""How ``make docs`` builds the site (Sphinx): docs/*.md and README as they are, a reference from the docstrings.

    sphinx-build --fail-on-warning --conf-dir docs/site docs site

Generated on the way: pages from README, CONTRIBUTING and CHANGELOG; every command with its help; every config field.
Checked in addition to Sphinx's checks: the files and tests that pages name exist, and the site fetches nothing from
elsewhere. Neither the build nor the site needs a network.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from sphinx.util import logging

from cnn2gnn_dist import __version__, cli
from cnn2gnn_dist.config import Config

ROOT = Path(__file__).resolve().parents[2]

project = "cnn2gnn-dist"
author = "the authors of cnn2gnn-dist"
project_copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["site"]
templates_path: list[str] = []
html_theme = "furo"
html_title = f"cnn2gnn-dist {version}"
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_copy_source = False
pygments_style = "tango"
pygments_dark_style = "monokai"

myst_heading_anchors = 3
myst_links_external_new_tab = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False  # leave torch's docstrings to torch
autodoc_default_options = {"members": True, "show-inheritance": True}
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
add_module_names = False
toc_object_entries_show_parents = "hide"

OUTSIDE = {"index": "README.md", "contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}
"""Pages whose text is in the root of the repository."""
FOLDERS = "benchmarks|cluster|cnn2gnn_dist|data|docs|graph|launch|models|pipeline|report|runtime|stages|tests|training"
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//"""
    r"""|<link\b(?![^>]*\brel=["']?canonical)[^>]*\bhref=["']?(?:https?:)?//|@import|url\(["']?(?:https?:)?//"""
)
log = logging.getLogger(__name__)


def setup(app: Any) -> None:
    """Sphinx calls this once."""
    os.environ["COLUMNS"] = "100"  # argparse wraps by it
    app.connect("source-read", fill)
    app.connect("build-finished", refuse_fetched)
    app.connect("autodoc-skip-member", skipped)
    app.connect("autodoc-process-bases", no_object)


def fill(app: Any, docname: str, source: list[str]) -> None:
    """Put the text of a generated page before that of its stub; check the names in a page."""
    if docname in OUTSIDE:
        text = (ROOT / OUTSIDE[docname]).read_text(encoding="utf-8").replace("](docs/", "](")
        for page, file in OUTSIDE.items():
            text = text.replace(f"]({file}", f"]({page}.md")
        source[0] = f"{text}\n{source[0]}"
    elif docname == "reference/commands":
        source[0] = "\n".join(commands(cli._parser(), 1))
    elif docname == "reference/config":
        source[0] = "\n".join(fields(Config, ""))
    for name in missing_files(source[0] if docname != "changelog" else ""):
        log.warning("`%s` is named and not there", name, location=docname)


def skipped(app: Any, kind: str, name: str, member: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the fields of named tuples, of which Python says "Alias for field number 0"."""
    return True if (getattr(member, "__doc__", "") or "").startswith("Alias for field") else None


def no_object(app: Any, name: str, member: type, options: Any, bases: list[Any]) -> None:
    """Every class is an object."""
    bases[:] = [base for base in bases if base is not object] or bases


def commands(parser: argparse.ArgumentParser, level: int) -> Iterator[str]:
    """Markdown: the help of a command and of those below it."""
    title = "Commands" if level == 1 else parser.prog
    yield f"{'#' * level} {title}\n\n```text\n{parser.format_help().rstrip()}\n```\n"
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                yield from commands(one, level + 1)


def fields(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """Markdown: every field of the config, a table for each section."""
    if not prefix:
        yield "# Config\n\nWhat `cnn2gnn config` prints. Overrides are `section.field=value`.\n"
    sections = []
    yield f"{(model.__doc__ or '').strip()}\n\n| field | default | meaning |\n| --- | --- | --- |"
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            sections.append((f"{prefix}{name}", kind))
            continue
        default = json.dumps(field.get_default(call_default_factory=True))
        meaning = re.sub(r"([|<>*])", r"\\\1", field.description or "")
        yield f"| `{prefix}{name}` | `{default}` | {meaning} |"
    for name, kind in sections:
        yield f"\n## {name}\n"
        yield from fields(kind, f"{name}.")


def missing_files(markdown: str) -> Iterator[str]:
    """Tests, and files below a folder of ours, that a page names but that do not exist."""
    tests = {path.name for path in (ROOT / "tests").rglob("*.py")}
    for name in re.findall(r"`(?:[\w/]*/)?(test_\w+\.py)", markdown):
        if name not in tests:
            yield name
    for name in re.findall(rf"`((?:{FOLDERS})/[\w/.-]+\.\w+)`", markdown):
        if not any((base / name).exists() for base in (ROOT, ROOT / "cnn2gnn_dist")):
            yield name


def refuse_fetched(app: Any, failure: Exception | None) -> None:
    """Refuse a site that fetches anything from elsewhere."""
    site = Path(app.outdir)
    for path in [*site.rglob("*.html"), *site.rglob("*.css")] if failure is None else []:
        for found in FETCHED.findall(path.read_text(encoding="utf-8")):
            log.warning("%s fetches from elsewhere: %s", path.relative_to(site), found)
