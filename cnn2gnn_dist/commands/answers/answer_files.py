"""Answers as files: JSON lines, CSV, Parquet, or a page with pictures."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

from cnn2gnn_dist import durable
from cnn2gnn_dist.data.images.decode import decode
from cnn2gnn_dist.data.images.image_files import read_file
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.answers import Answer
from cnn2gnn_dist.log import counted

KINDS = (".jsonl", ".csv", ".parquet", ".html")
_GROUP = 4096
_PICTURE = 96


class Writer(Protocol):
    """Takes answers one by one."""

    def __call__(self, answer: Answer) -> None:
        """Write one answer."""


def writer_of(path: Path, *, shared: bool = False) -> AbstractContextManager[Writer]:
    """Open a file of answers, whose suffix gives its format; it appears once it is complete.

    Args:
        path: the file.
        shared: another process may be writing the same answers (``durable.replacing``).

    Raises:
        UserError: unknown suffix; the folder is missing or can't be written to.
    """
    if path.suffix.lower() not in KINDS:
        raise UserError(
            f"answers can't be written in this format: {path.suffix or 'no suffix'}",
            where=f"--out {path}",
            remedy=f"one of {', '.join(KINDS)}",
        )
    if not path.parent.is_dir():
        raise UserError(
            "the folder does not exist", where=str(path.parent), remedy="create it first"
        )
    durable.check_writable(path)
    return _opened(path, path.suffix.lower(), shared)


@contextmanager
def _opened(path: Path, kind: str, shared: bool) -> Iterator[Writer]:
    with durable.replacing(path, shared=shared) as temporary:
        if kind == ".parquet":
            with _parquet(temporary) as write:
                yield write
            return
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            if kind == ".jsonl":
                yield lambda answer: _line(file, json.dumps(answer.as_dict()))
            elif kind == ".csv":
                rows = csv.DictWriter(file, fieldnames=list(_row(Answer(""))))
                rows.writeheader()
                yield lambda answer: rows.writerow(_row(answer))
            else:
                with _page(file) as write:
                    yield write


@contextmanager
def _page(file: TextIO) -> Iterator[Writer]:
    file.write(_HEAD)
    above: str | None = None

    def write(answer: Answer) -> None:
        nonlocal above
        if above is None and (above := company(answer)) is not None:
            _line(file, f"<p>{html.escape(above)}</p>")
            if (why := doubt(answer)) is not None:
                _line(file, f"<p>{html.escape(why)}</p>")
        _line(file, _figure(answer))

    yield write
    file.write("</main>\n")


def _line(file: TextIO, text: str) -> None:
    file.write(f"{text}\n")


def _row(answer: Answer) -> dict[str, Any]:
    classes: dict[str, float] = {}
    for name, share in answer.classes:  # of two classes with the same name the more probable one
        classes.setdefault(name, share)
    return {
        "image": answer.name,
        "class": answer.label,
        "probability": answer.probability,
        "path": answer.path,
        "classes": json.dumps(classes),
        "neighbours": json.dumps([[n.key, n.label, round(n.weight, 4)] for n in answer.neighbours]),
        "scores": json.dumps(answer.scores),
        "error": answer.error,
    }


@contextmanager
def _parquet(path: Path) -> Iterator[Writer]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [(name, pa.string()) for name in _row(Answer(""))]
    columns[2] = ("probability", pa.float64())
    schema = pa.schema(columns)
    rows: list[dict[str, Any]] = []
    with pq.ParquetWriter(path, schema) as file:

        def write(answer: Answer) -> None:
            rows.append(_row(answer))
            if len(rows) >= _GROUP:
                file.write_table(pa.Table.from_pylist(rows, schema))
                rows.clear()

        yield write
        file.write_table(pa.Table.from_pylist(rows, schema))


def company(answer: Answer) -> str | None:
    """Whether the images that it was answered with are related, or were said to be; None: it was answered alone."""
    found = answer.scores.get("together")
    if found is None:
        return None
    depends = "; each answer depends on the other images" if found["related"] else ""
    images = counted(found["images"], "image")
    if found.get("same"):
        return f"{images} taken as one class, as asked for by --same{depends}"
    classes = counted(found["classes"], "class", "classes")
    return f"related: {'yes' if found['related'] else 'no'}; {classes} among {images}{depends}"


def doubt(answer: Answer) -> str | None:
    """That the images alone are not of the one class that they were said to show; None: they may be."""
    found = answer.scores.get("together", {})
    if not found.get("contradicted"):
        return None
    return (
        f"alone, {found['elsewhere']:,} of {counted(found['images'], 'image')} "
        f"{'is' if found['elsewhere'] == 1 else 'are'} of another class "
        f"({100 * found['elsewhere_probability']:.1f} % sure on average); without --same each is answered alone"
    )


def set_of(answer: Answer) -> str | None:
    """Its set of classes with the requested coverage; None: none was requested."""
    found = answer.scores.get("set")
    return None if found is None else f"set: {', '.join(found) or 'none'}"


def _figure(answer: Answer) -> str:
    name = html.escape(answer.name)
    if answer.error is not None:
        return f'<article class="bad"><h2>{name}</h2><p>{html.escape(answer.error)}</p></article>'
    classes = "".join(
        f"<li><meter value={p:.4f}></meter> {html.escape(label)} {p:.1%}</li>"
        for label, p in answer.classes
    )
    facts = [f"path: {answer.path}"] + [fact for fact in [set_of(answer)] if fact is not None]
    said = "".join(f"<p>{html.escape(fact)}</p>" for fact in facts)
    near = "".join(
        f"<figure>{_picture(n.thumbnail(), n.key)}<figcaption>{html.escape(n.label)}"
        f" {n.weight:.2f}</figcaption></figure>"
        for n in answer.neighbours
    )
    return (
        f"<article>{_picture(_file(answer.name), answer.name)}<div><h2>{name}</h2>"
        f"<ol>{classes}</ol>{said}</div><div class=near>{near}</div></article>"
    )


def _file(name: str) -> bytes | None:
    """A small copy of an image file, as the model saw it; None if the input was not a file."""
    from PIL import Image

    try:
        if not os.path.isfile(name):  # a pipe has been read, and would wait for another writer
            return None
        small = Image.fromarray(decode(read_file(name)))
        small.thumbnail((_PICTURE, _PICTURE))
        data = io.BytesIO()
        small.save(data, "JPEG", quality=85)
        return data.getvalue()
    except Exception:  # the picture is optional: the answer is valid without it
        return None


def _picture(data: bytes | None, text: str) -> str:
    if data is None:
        return "<span class=none></span>"
    kind = "png" if data[:4] == b"\x89PNG" else "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<img src="{source}" alt="{html.escape(text)}">'


_HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Answers</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif }
main { max-width: 70rem; margin: auto; padding: 1rem }
article { display: flex; flex-wrap: wrap; gap: 1rem; padding: .8rem 0; border-bottom: 1px solid #8884 }
article > img, .none { width: 96px; height: 96px; object-fit: contain; background: #8882 }
h2 { font-size: 1rem; margin: 0; overflow-wrap: anywhere } ol { margin: .3rem 0; padding: 0; list-style: none }
article p { font-size: .85rem; margin: 0; overflow-wrap: anywhere }
article > div:first-of-type { flex: 1 1 16rem } .near { display: flex; flex-wrap: wrap; gap: .5rem }
figure { margin: 0; width: 72px } figure img { width: 72px; height: 72px; object-fit: contain }
figcaption { font-size: .75rem; overflow-wrap: anywhere } .bad p { color: #b00020 }
meter { width: 6rem }
</style><main><h1>Answers</h1>
"""
