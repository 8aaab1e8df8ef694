"""README's picture of the demo is there after it, and the run has not learned from it."""

from __future__ import annotations

import re
import subprocess

from cnn2gnn_dist import settings
from cnn2gnn_dist.data.images.decode import image_size
from cnn2gnn_dist.data.index.manifest import index
from cnn2gnn_dist.data.index.split import split_labelled
from cnn2gnn_dist.data.packing.packers import pack_digits
from tests.support import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_the_commands_find_a_held_out_digit_in_the_demos_shards(tmp_path):
    config = settings.load("demo", [])
    folder = tmp_path / "runs" / config.name / "shards"
    packed = index(
        pack_digits(folder, shard_size=config.data.shard_size, prefix="train", progress=False)
    )
    command = re.search(r"^tar -xOf \S+ (\S+)\.png > image\.png", README, re.MULTILINE)
    assert command is not None
    subprocess.run(command[0], shell=True, cwd=tmp_path, check=True)
    assert image_size((tmp_path / "image.png").read_bytes()) == (32, 32)
    held = split_labelled(packed, config.data.holdout, config.seed)[1]
    assert command[1] in {packed.key(row) for row in held.tolist()}
    for used in re.findall(r"^cnn2gnn predict .* (\S+\.(?:png|tar))\b", README, re.MULTILINE):
        assert (tmp_path / used).is_file()
