"""Fuzz the decoder and the views with mutated images of every kind, some of them real.

PYTHONPATH=. python benchmarks/fuzz_decode.py SECONDS              # with atheris, or else by plain mutation
PYTHONPATH=. python benchmarks/fuzz_decode.py SECONDS --sanitize   # partial.c under ASan and UBSan

A finding is: an exception other than CorruptSample, 10 s or (at a limit of a million pixels per image)
64 MB of additional memory for one input, a row modified by a corrupt image, fill_views that disagrees with
decode, or partial decode that gives other pixels than the full one or reports corruption where the
full one reads the image. The first finding ends the run; its bytes are left in the current folder.
Damage that shows only below the crop, which partial decode ignores, is counted; its pixels must be
those of a lenient full decoder.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

try:
    import atheris
except ImportError:
    atheris = None
SANITIZED = "FUZZ_SANITIZED" in os.environ  # the library built for it
if SANITIZED:
    atheris = None  # it has its own sanitizer runtime

MINE = ["cnn2gnn_dist.data", "PIL"]
with atheris.instrument_imports(MINE) if atheris else contextlib.nullcontext():
    from cnn2gnn_dist.data.images import decode as decoding
    from cnn2gnn_dist.data.images import partial, views
    from cnn2gnn_dist.data.images.batch_views import fill_views
    from cnn2gnn_dist.data.images.decode import CorruptSample, decode
    from cnn2gnn_dist.data.images.views import CLEAN, ViewSpec, render
    from cnn2gnn_dist.data.tar.samples import samples

    for kind in ("Jpeg", "Png", "Gif", "Bmp", "Tiff", "WebP", "Ppm"):
        importlib.import_module(f"PIL.{kind}ImagePlugin")

import numpy as np  # noqa: E402
import simplejpeg  # noqa: E402

from tests.support import bombs, jpegs  # noqa: E402
from tests.unit.data import test_pixels  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SPARE, MUCH, MAX_PIXELS, LONGEST, MAX_BYTES = 400 << 20, 64, 1_000_000, 10, 1 << 17
SPECS = [
    (ViewSpec("random_resized_crop", 32), 0),
    (ViewSpec("crop_flip", 32), 1),
    (ViewSpec("none", 40, resize=1.14), CLEAN),
]
COUNTS: Counter[str] = Counter()
SWITCH = {"partial": True}


def switched(crop: Any) -> Any:
    def maybe(*arguments: Any) -> Any:
        made = crop(*arguments) if SWITCH["partial"] else None
        COUNTS["crops by partial decode"] += made is not None
        return made

    return maybe


def outcome(spec: ViewSpec, data: bytes, view: int, *, use_partial: bool) -> Any:
    """The view, or the reason why there is none."""
    SWITCH["partial"] = use_partial
    images = np.full((1, spec.size, spec.size, 3), 7, np.uint8)
    wrong = fill_views(spec, [data], np.array([5]), view, images)
    if wrong:
        assert (images == 7).all(), "a corrupt image has touched its row"
        return sound_reason(wrong[0])
    return images[0]


def sound_reason(error: CorruptSample) -> CorruptSample:
    assert "MemoryError" not in str(error), f"too much memory: {error}"
    assert " at 0x" not in str(error), f"an address in a message: {error}"
    return error


def check(data: bytes) -> None:
    """Raise if one input is handled wrongly."""
    COUNTS["inputs"] += 1
    limit()
    before = peak()
    treat(data)
    assert SANITIZED or peak() - before < MUCH, f"{peak() - before} MB more"


def treat(data: bytes) -> None:
    try:
        pixels = decode(data)
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
        assert pixels.shape[0] * pixels.shape[1] <= MAX_PIXELS
    except CorruptSample as error:
        sound_reason(error)
        pixels = None
    COUNTS["inputs decoded"] += pixels is not None
    for spec, view in SPECS:
        plain = outcome(spec, data, view, use_partial=False)
        wanted: Any = None
        with contextlib.suppress(CorruptSample):  # the image is too narrow, or corrupt
            wanted = None if pixels is None else render(spec, pixels, 5, view)
        assert (wanted is None) == isinstance(plain, CorruptSample), "fill_views against decode"
        assert wanted is None or np.array_equal(plain, wanted), "fill_views against render"
        if spec.kind == "random_resized_crop":
            found = outcome(spec, data, view, use_partial=True)
            if isinstance(plain, CorruptSample) and isinstance(found, np.ndarray):
                COUNTS["damage that partial decode lets pass"] += 1
                plain = render(spec, simplejpeg.decode_jpeg(data, "RGB", strict=False), 5, view)
            if isinstance(plain, np.ndarray):
                assert isinstance(found, np.ndarray), f"partial decode: {found}"
                assert np.array_equal(found, plain), "partial decode has other pixels"


def seeds() -> list[bytes]:
    """Valid images of each kind, some of them photographs, and the small decompression bombs."""
    kinds = {**jpegs.CUT, **jpegs.WHOLE}
    found = [
        encode(jpegs.textured(*size)) for encode in kinds.values() for size in ((32, 32), (75, 61))
    ]
    found += [bombs.saved(kind) for kind in ("PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")]
    found += [bombs.saved("TIFF", compression=name) for name in ("jpeg", "tiff_lzw", "packbits")]
    found += [case[0] for case in (test_pixels.SOUND | test_pixels.REFUSED).values()]
    found += [bomb for bomb in bombs.all_bombs().values() if len(bomb) < 4096]
    folder = Path(os.environ.get("CNN2GNN_DATA") or ROOT.parent / "shared" / "data")
    for shard in sorted((folder / "imagenet-sample").glob("*.tar")):
        photographs = [s.fields["jpg"] for s in samples(shard) if "jpg" in s.fields]
        with open(shard, "rb") as file:
            for member in sorted(photographs, key=lambda m: m.size)[:6]:
                file.seek(member.offset)
                found.append(file.read(member.size))
    return [data for data in found if 0 < len(data) <= MAX_BYTES]


def with_checksums(data: bytes) -> bytes:
    """A PNG with its chunk checksums corrected, so that damage gets past them; other formats unchanged."""
    if data[:4] != b"\x89PNG":
        return data
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        length = int.from_bytes(out[at : at + 4])
        end = at + 8 + length
        if end + 4 > len(out):
            break
        out[end : end + 4] = struct.pack(">I", zlib.crc32(out[at + 4 : end]))
        at = end + 4
    return bytes(out)


def mutated(rng: np.random.Generator, pool: list[bytes]) -> bytes:
    """One image of the pool with a few changes, most of them in its headers, where they have most effect."""
    data = bytearray(pool[rng.integers(len(pool))])
    for _ in range(rng.integers(1, 5)):
        near = min(len(data), 700) if rng.random() < 0.6 else len(data)
        at = int(rng.integers(near + 1))
        width = int(2 ** rng.integers(0, 8))
        odd = [0, 255, 254, 127, 128, 1, 2, 4, 16, 64, 217, 218, 192, 194, 196, 208]
        choice = int(rng.integers(6))
        if choice == 0:
            data[at : at + 1] = bytes([odd[rng.integers(len(odd))]])
        elif choice == 1:
            data[at : at + 2] = b"\xff" + bytes([odd[rng.integers(len(odd))]])
        elif choice == 2:
            data[at : at + width] = rng.integers(0, 256, width, np.uint8).tobytes()
        elif choice == 3:
            del data[at : at + width]
        elif choice == 4:
            other = pool[rng.integers(len(pool))]
            start = int(rng.integers(len(other)))
            data[at:at] = other[start : start + width]
        else:
            data[at : at + width] = bytes(width)
    return bytes(data[:MAX_BYTES])


def prepare() -> None:
    """Set limits, and load everything that is loaded once."""
    warnings.simplefilter("ignore")
    decoding.MAX_PIXELS = views.MAX_PIXELS = MAX_PIXELS
    decoding.MAX_WORK = 32 * MAX_PIXELS
    if SANITIZED:
        partial.path = lambda: Path(os.environ["FUZZ_SANITIZED"])
    usable = partial._decoder() is not None
    print(f"partial decode: {'in use' if usable else 'not built'}", file=sys.stderr)
    partial.crop = switched(partial.crop)
    for data in seeds():
        check(data)


def limit() -> None:
    """Limit the address space to the current usage plus SPARE: atheris itself leaks 2 kB per input."""
    if not SANITIZED:  # a sanitizer's shadow memory takes terabytes of addresses
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(
            resource.RLIMIT_AS, (pages * resource.getpagesize() + SPARE, resource.RLIM_INFINITY)
        )


def peak() -> int:
    """Peak memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def report(start: float) -> None:
    print(f"{time.monotonic() - start:.0f} s, peak memory {peak()} MB", file=sys.stderr)
    for name, count in COUNTS.most_common():
        print(f"  {count:9,} {name}", file=sys.stderr)


def guided(seconds: int, folder: Path) -> None:
    """Run libFuzzer; it ends the process."""
    for number, data in enumerate(seeds()):
        (folder / f"seed{number}").write_bytes(data)
    start = last = time.monotonic()

    def one(data: bytes) -> None:
        nonlocal last
        check(with_checksums(data))
        now = time.monotonic()
        if now - last > 60 or now - start > seconds - 2 > last - start:
            last = now
            report(start)

    pool = seeds()

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        if seed % 2:
            return bytes(atheris.Mutate(data, max_size))[:max_size]
        return mutated(np.random.default_rng(seed), [data, data, *pool])[:max_size]

    options = [f"-max_total_time={seconds}", f"-timeout={LONGEST}", f"-max_len={MAX_BYTES}"]
    atheris.Setup(
        [sys.argv[0], *options, "-print_final_stats=1", str(folder)], one, custom_mutator=mutate
    )
    prepare()
    atheris.Fuzz()


def unguided(seconds: int) -> None:
    """Run the same checks on plain mutations."""
    prepare()
    start = last = time.monotonic()
    pool, rng = seeds(), np.random.default_rng(os.getpid())
    current = Path(f"finding-{os.getpid()}")
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a hang ends the process, in C code too
    while time.monotonic() - start < seconds:
        data = with_checksums(mutated(rng, pool))
        current.write_bytes(data)
        signal.alarm(LONGEST)
        check(data)
        signal.alarm(0)
        if time.monotonic() - last > 60:
            last = time.monotonic()
            report(start)
    current.unlink(missing_ok=True)
    report(start)


def sanitized(seconds: str, folder: str) -> int:
    """Build partial.c with sanitizers and run an interpreter without them on it."""
    flags = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    library = partial.build(Path(folder) / "sanitized.so", *flags)
    runtime = subprocess.check_output(["gcc", "-print-file-name=libasan.so"], text=True).strip()
    changed = {
        "FUZZ_SANITIZED": str(library),
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    command = [sys.executable, __file__, seconds, folder]
    return subprocess.run(command, env={**os.environ, **changed}).returncode


def main() -> int:
    """Fuzz in a separate process (libFuzzer exits its process abruptly) and clean up after it."""
    if len(sys.argv) > 2 and sys.argv[2] != "--sanitize":
        if atheris:
            guided(int(sys.argv[1]), Path(sys.argv[2]))
        else:
            unguided(int(sys.argv[1]))
        return 0
    with tempfile.TemporaryDirectory(prefix="fuzz-decode-") as folder:
        if "--sanitize" in sys.argv:
            return sanitized(sys.argv[1], folder)
        return subprocess.run([sys.executable, __file__, sys.argv[1], folder]).returncode


if __name__ == "__main__":
    sys.exit(main())
