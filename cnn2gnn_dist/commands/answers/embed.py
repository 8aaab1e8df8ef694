"""``cnn2gnn embed``: features and projections of images as Parquet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnn2gnn_dist import durable
from cnn2gnn_dist.commands.model.opening import opened
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.inputs import complaint, expand
from cnn2gnn_dist.log import counted, output, progress, report_error

GROUP = 4096


def command(model: Path, images: Sequence[str], out: Path) -> int:
    """Write ``image``, ``x``, ``z`` and ``error`` of each image; returns 1 if some can't be read.

    Args:
        model: folder of a model or of a finished run.
        images: files, folders, tar shards, Parquet files.
        out: Parquet file; it appears once it is complete.

    Raises:
        UserError: not a model; not a Parquet file; it can't be written; the disk is full.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if out.suffix.lower() != ".parquet":
        raise UserError(
            "embeddings are written as Parquet", where=f"--out {out}", remedy="FILE.parquet"
        )
    durable.check_writable(out)
    vector = pa.list_(pa.float32())
    schema = pa.schema(
        [("image", pa.string()), ("x", vector), ("z", vector), ("error", pa.string())]
    )
    failed = count = 0
    rows: list[dict[str, Any]] = []
    with (
        opened(model) as classifier,
        durable.replacing(out) as temporary,
        pq.ParquetWriter(temporary, schema) as file,
    ):
        found = classifier.embedded(expand(list(images), left_out=report_error))
        for one, x, z in progress(found, "embed", unit="image", delay=2):
            if one.error is not None:
                report_error(complaint(one.name, one.error))
            failed, count = failed + (one.error is not None), count + (one.error is None)
            rows.append({"image": one.name, "x": x, "z": z, "error": one.error})
            if len(rows) == GROUP:
                file.write_table(pa.Table.from_pylist(rows, schema))
                rows.clear()
        file.write_table(pa.Table.from_pylist(rows, schema))
    missing = f", {failed:,} could not be read" if failed else ""
    output(f"embeddings  {out}: {counted(count, 'image')}{missing}")
    return 1 if failed else 0
