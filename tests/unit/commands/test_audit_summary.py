"""What `cnn2gnn audit` prints about near-duplicates of tiny images, of which most aren't any."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest

from cnn2gnn_dist.commands.audit.command import _summary
from cnn2gnn_dist.commands.audit.source import Source, middle_size
from cnn2gnn_dist.data.index.manifest import Manifest, index
from cnn2gnn_dist.data.packing.packers import pack_digits
from cnn2gnn_dist.inference.audit.findings import TrainingSet
from tests.support.shards import make_shards, write_tar


@dataclass
class Images(Source):
    """Only the images of a run."""

    manifest: Manifest | None = None

    def middle_size(self) -> tuple[int, int] | None:
        return None if self.manifest is None else middle_size(self.manifest, "shards")


def said(manifest: Manifest | None, kinds: list[str]) -> list[str]:
    nothing = np.zeros((0, 1), np.float32)
    labels = np.zeros(0, np.int32)
    training = TrainingSet(nothing, nothing, labels, labels[:, None], None, ["a"])
    pairs = pa.table({"set": ["train"] * len(kinds), "kind": pa.array(kinds, pa.string())})
    tables = {
        "labels": pa.table({"both_agree": pa.array([], pa.bool_())}),
        "duplicates": pairs,
        "bleeding": pa.table({"class": pa.array([], pa.string())}),
    }
    return _summary(Images("run", training, [], {}, manifest=manifest), tables)


def made(folder, sizes: list[tuple[int, int]]) -> Manifest:
    folder.mkdir()
    images = [np.zeros((*size, 3), np.uint8) for size in sizes]
    return index(make_shards(folder, images, [0] * len(images)))


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ([(8, 8)] * 40, "8 x 8"),
        ([(40, 15)] * 3, "15 x 40"),
        ([(40, 15)] * 21 + [(40, 30)] * 19, "15 x 40"),  # more than half of them
        ([(40, 15)] * 18 + [(40, 30)] * 22, None),
        ([(16, 16)] * 3, None),
    ],
)
def test_near_pairs_of_tiny_images_are_doubted(tmp_path, sizes, named):
    found = made(tmp_path / "a", sizes)
    lines = said(found, ["near", "exact"])
    assert lines[1] == "duplicates  1 exact and 1 near pairs within the training images"
    if named is None:
        assert len(lines) == 2
    else:
        assert lines[2].startswith(f"note        at {named} pixels different images may look like")
    assert len(said(found, ["exact"])) == 2  # equal bytes are no coincidence
    assert len(said(None, ["near"])) == 2  # a model: the sizes are not known


def test_what_can_not_be_read_has_no_size(tmp_path):
    members = [("a.cls", b"0"), ("a.jpg", b"nothing"), ("b.cls", b"0"), ("b.jpg", b"")]
    found = index([write_tar(tmp_path / "a.tar", members)])
    assert middle_size(found, "shards") is None


def test_the_digits_are_tiny_though_they_are_packed_enlarged(tmp_path):
    """The demo is where hundreds of such pairs are found."""
    packed = index(pack_digits(tmp_path, limit=20))
    assert middle_size(packed, "shards") == (32, 32)
    assert middle_size(packed, "digits") == (8, 8)
