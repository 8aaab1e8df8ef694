"""torchvision's own JPEG decoder, also where its wheel's CUDA build meets a CPU build of torch.

There ``torchvision.io`` can't load its library, ``image.so``: two CUDA libraries of torch are missing. Only the
decoder for GPUs calls them. So empty libraries of these names are compiled (gcc), and ``image.so`` loads; the code
that decodes on the CPU is that of the wheel.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cnn2gnn_dist.compat import import_torchvision

MISSING = ("libc10_cuda.so", "libtorch_cuda.so")


def decoder(folder: Path) -> Callable[[bytes], Any]:
    """Return bytes → uint8 [3, H, W]; compiled libraries are written to ``folder``."""
    import torch

    torchvision = import_torchvision()
    library = Path(torchvision.__file__).with_name("image.so")
    try:
        torch.ops.load_library(str(library))
    except OSError:
        for name in MISSING:
            ctypes.CDLL(str(_stub(folder / name, library)), ctypes.RTLD_GLOBAL)
        torch.ops.load_library(str(library))
    rgb = 3  # torchvision.io.ImageReadMode.RGB

    def decode(data: bytes) -> Any:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return torch.ops.image.decode_jpeg.default(encoded, rgb, True)

    return decode


def _stub(path: Path, library: Path) -> Path:
    """Compile a library that defines the CUDA symbols of ``library``, if it is the first of them."""
    if path.exists():
        return path
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    )
    names = [line.split()[-1] for line in listed.stdout.splitlines()]
    mine = [n for n in names if "4cuda" in n and "@" not in n] if path.name == MISSING[0] else []
    source = "\n".join(f"char {name}[64];" for name in mine)
    made = path.with_suffix(".part")
    subprocess.run(
        ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", "-x", "c", "-", "-o", str(made)],
        input=source,
        text=True,
        check=True,
    )
    made.rename(path)
    return path
