"""``audit/index.html``: the audit as one self-contained page, on which a person decides."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import jinja2

from cnn2gnn_dist import durable

TEMPLATE = "audit.html.j2"


def write_page(path: Path, page: dict[str, Any]) -> None:
    """Render the page from plain data (the template lists what it needs), replacing the file atomically."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    durable.write_text(path, environment.get_template(TEMPLATE).render(**page))


def jpeg_uri(data: bytes | None) -> str | None:
    """Encoded JPEG as a data URI; None stays None."""
    return (
        None if data is None else "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")
    )
