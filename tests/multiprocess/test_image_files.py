"""Which files below a folder are images: across processes."""

from __future__ import annotations

import subprocess
import sys

from tests.unit.data.test_image_files import PNG, tree


def test_what_a_shell_substitutes_is_read(tmp_path):
    tree(tmp_path, "1.png")
    code = "import sys; from cnn2gnn_dist.data.images.image_files import read_file; "
    code += "sys.stdout.buffer.write(read_file(sys.argv[1]))"
    for wait in ("", "sleep 0.5; "):  # the pipe is written before it is opened, or after
        line = f'"$0" -c "$1" <({wait}cat 1.png)'
        command = ["bash", "-c", line, sys.executable, code]
        assert (
            subprocess.run(command, cwd=tmp_path, stdout=-1, timeout=300, check=True).stdout == PNG
        )
