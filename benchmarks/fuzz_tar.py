"""Fuzz the header walk and the index: mutated and generated archives, compared with webdataset.

PYTHONPATH=. python benchmarks/fuzz_tar.py SECONDS    # coverage-guided with atheris, or else by hypothesis

A finding is: an exception other than UserError, a message that is long or not printable, 512 MB of
address space or 10 s for one archive (a few kB each), a member or sample that tarfile or webdataset
reads differently in an archive that we accept, or a file that appears. The first finding ends the run;
its archive is left in the current folder.
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path

try:
    import atheris
except ImportError:
    atheris = None

with atheris.instrument_imports(["cnn2gnn_dist.data"]) if atheris else contextlib.nullcontext():
    from cnn2gnn_dist.data.index.manifest import Manifest, index
    from cnn2gnn_dist.data.tar import samples
    from cnn2gnn_dist.errors import UserError

from tests.support import archives
from tests.support.archives import END, base256, file, gnu, header, pax, record, repair

SPARE = 512 << 20
FOLDER = Path(sys.argv[2] if len(sys.argv) > 2 else os.devnull)  # created by the first process
SHARD, SAVED = FOLDER / "s.tar", FOLDER / "m.arrow"
MAX = 1 << 14
COUNTS: Counter[str] = Counter()
KINDS = b"000000\0\x007LKxgX123456SVMZ"
WORDS = [
    b"a.jpg",
    b"a.cls",
    b"b.png",
    b"b.json",
    b"d/._a.jpg",
    b"../k.jpg",
    b"x" * 99 + b"/",
    b"B.JPG",
]
SIZES = [0, 1, 5, 511, 512, 513, 8**11 - 1, 1 << 31, 1 << 40, 1 << 63, (1 << 88) - 1]
KEYS = [
    b"path",
    b"size",
    b"comment",
    b"GNU.sparse.major",
    b"GNU.sparse.name",
    b"hdrcharset",
    b"linkpath",
    b"",
]


def with_checksums(data: bytes) -> bytes:
    """The archive with the checksums corrected along its chain of headers, so that damage gets past them."""
    out, position = bytearray(data), 0
    while position + 512 <= len(out):
        block = bytes(out[position : position + 512])
        if not any(block):
            break
        out[position : position + 512] = repair(block)
        digits = block[124:135].strip(b" \0")
        size = int(digits, 8) if digits and not digits.strip(b"01234567") else 0
        step = 512 + -(-size // 512) * 512
        position += step if step <= len(out) - position else 512
    return bytes(out)


def generated(draw: atheris.FuzzedDataProvider) -> bytes:
    """An archive of unusual pieces, combined as the input's bytes choose."""
    out = []
    for _ in range(draw.ConsumeIntInRange(1, 8)):
        if draw.ConsumeProbability() < 0.7:
            name = WORDS[draw.ConsumeIntInRange(0, len(WORDS) - 1)]
        else:
            name = draw.ConsumeBytes(draw.ConsumeIntInRange(0, 40))
        data = draw.ConsumeBytes(draw.ConsumeIntInRange(0, 30))
        choice = draw.ConsumeIntInRange(0, 9)
        if choice == 0:
            out.append(gnu(name, draw.PickValueInList([b"L", b"K"])))
        elif choice <= 2:
            value = draw.PickValueInList([name, data, b"%d" % len(data), b"1_0", b"-1"])
            records = {draw.PickValueInList(KEYS): value, draw.PickValueInList(KEYS): data}
            out.append(pax(records, draw.PickValueInList([b"x", b"x", b"g", b"X"])))
        elif choice == 3:
            text = record(b"path", name) + data
            out.append(header(b"x", len(text), b"x") + archives.padded(text))
        elif choice == 4:
            size = draw.PickValueInList(SIZES)
            field = base256(size, 12) if size >= 8**11 or draw.ConsumeBool() else b"%o" % size
            kind = draw.ConsumeIntInRange(0, len(KINDS) - 1)
            out.append(header(name, field, KINDS[kind : kind + 1]))
        else:
            kind = draw.ConsumeIntInRange(0, len(KINDS) - 1)
            fields = {}
            if draw.ConsumeBool():
                names = ["prefix", "magic", "owner", "mtime", "device"]
                widths = {"owner": 8, "mtime": 12, "device": 16}
                chosen = draw.PickValueInList(names)
                value = draw.ConsumeBytes(widths.get(chosen, 8))
                fields = {chosen: value.ljust(widths.get(chosen, 0), b"\0")}
            out.append(file(name, data, KINDS[kind : kind + 1], **fields))
    return b"".join(out) + (END if draw.ConsumeProbability() < 0.9 else b"")


def refusal(work: object) -> object:
    """The result of ``work``, or its UserError, whose text must be printable."""
    try:
        return work()
    except UserError as error:
        text = str(error)
        assert len(text) < 2000, "a long message"
        assert text.replace("\n", "").isprintable(), "a message that does not print"
        return error


def check(data: bytes) -> None:
    """Raise if one archive is handled wrongly."""
    SHARD.write_bytes(data)
    COUNTS["archives"] += 1
    members = refusal(lambda: list(samples.walk(SHARD)))
    found = refusal(lambda: list(samples.samples(SHARD)))
    if isinstance(members, UserError):
        COUNTS["refused by the walk"] += 1
        assert isinstance(found, UserError)
    else:
        compare_members(data, members)
    if not isinstance(found, UserError):
        compare_samples(data, found)
    manifest = refusal(
        lambda: index(
            [SHARD], progress=False, require_labels=False, allow_empty_classes=True, checksums=True
        )
    )
    if isinstance(manifest, Manifest):
        COUNTS["indexed"] += 1
        manifest.save(SAVED)
        assert Manifest.load(SAVED).keys.to_pylist() == [sample.key for sample in found]
        SAVED.unlink()
    assert os.listdir(FOLDER) == [SHARD.name]


def compare_members(data: bytes, members: list[samples.Member]) -> None:
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            theirs = [(m.name, m.offset_data, m.size) for m in archive if m.isreg()]
    except (tarfile.TarError, RecursionError, UnicodeDecodeError) as error:
        COUNTS[f"walked, tarfile: {str(error)[:26]}"] += 1
        return
    COUNTS["members compared"] += 1
    assert members == theirs, (members, theirs)


def compare_samples(data: bytes, found: list[samples.TarSample]) -> None:
    try:
        theirs = archives.by_webdataset(SHARD)
    except (tarfile.TarError, RecursionError, UnicodeDecodeError) as error:
        COUNTS[f"accepted, webdataset: {str(error)[:26]}"] += 1
        return
    ours = [
        (s.key, {k: data[m.offset : m.offset + m.size] for k, m in s.fields.items()}) for s in found
    ]
    COUNTS[f"samples compared{' (some)' if ours else ' (none)'}"] += 1
    assert ours == theirs, (ours, theirs)


def seeds() -> list[bytes]:
    """A few valid archives of each kind to start from."""
    sample = file(b"a.cls", b"1") + file(b"a.jpg", b"x" * 600)
    return [
        sample + END,
        gnu(b"d/" * 70 + b"a.jpg") + file(b"d", b"x") + sample + END,
        pax({b"path": b"p/q.jpg", b"size": b"3"})
        + header(b"q")
        + archives.padded(b"abc")
        + sample
        + END,
        pax({b"comment": b"c"}, b"g") + sample + END,
        header(b"a.jpg", base256(5, 12)) + archives.padded(b"12345") + END,
        file(b"a.json", b'{"class_name": "x"}', prefix=b"pre")
        + file(b"a.cls", b"0", prefix=b"pre")
        + END,
        b"".join(file(b"%d.cls" % n, b"%d" % n) + file(b"%d.png" % n, b"i") for n in range(5))
        + END,
        header(b"d/", 0, b"5") + header(b"l", 0, b"2") + file(b"o/", b"", b"\0") + sample + END,
    ]


def limit() -> None:
    """Limit the address space to the current usage plus SPARE."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * os.sysconf("SC_PAGE_SIZE") + SPARE
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def report(start: float) -> None:
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    print(f"{time.monotonic() - start:.0f} s, peak memory {peak:.0f} MB", file=sys.stderr)
    for name, count in COUNTS.most_common():
        print(f"  {count:9,} {name}", file=sys.stderr)


def guided(seconds: int) -> None:
    """Run libFuzzer; it ends the process."""
    start, corpus = time.monotonic(), FOLDER.with_name("corpus")
    corpus.mkdir()
    for number, data in enumerate(seeds()):
        (corpus / f"raw{number}").write_bytes(b"\0" + data)
        (corpus / f"drawn{number}").write_bytes(b"\2" + os.urandom(200))
    last = start

    def one(data: bytes) -> None:
        nonlocal last
        kind, body = data[:1], data[1:]
        if kind and kind[0] % 4 == 0:
            body = with_checksums(body)
        elif kind and kind[0] % 4 != 1:
            body = generated(atheris.FuzzedDataProvider(body))
        check(body)
        now = time.monotonic()
        if now - last > 60 or now - start > seconds - 2 > last - start:
            last = now
            report(start)

    options = [
        f"-max_total_time={seconds}",
        "-timeout=10",
        f"-max_len={MAX}",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    limit()
    atheris.Fuzz()


def unguided(seconds: int) -> None:
    """Run the same checks on mutations of what hypothesis generates."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    start = time.monotonic()
    signal.signal(
        signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("10 s for one archive"))
    )
    base = st.one_of(archives.archives, st.sampled_from(seeds()))
    damage = st.lists(st.tuples(st.integers(0, MAX), st.integers(0, 255)), max_size=4)

    @settings(
        max_examples=2000, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(base, damage, st.booleans())
    def one(data: bytes, changes: list[tuple[int, int]], sums: bool) -> None:
        changed = bytearray(data)
        for place, value in changes:
            changed[place % len(changed)] = value
        signal.alarm(10)
        check(with_checksums(bytes(changed)) if sums else bytes(changed))
        signal.alarm(0)

    limit()
    while time.monotonic() - start < seconds:
        one()
        report(start)


def main() -> int:
    """Fuzz in a separate process (libFuzzer exits its process abruptly) and clean up after it."""
    if len(sys.argv) > 2:
        (guided if atheris else unguided)(int(sys.argv[1]))
        return 0
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # fsync waits for a busy disk
    with tempfile.TemporaryDirectory(prefix="fuzz-tar-", dir=memory) as folder:
        work = Path(folder) / "work"
        work.mkdir()
        return subprocess.run([sys.executable, __file__, sys.argv[1], str(work)]).returncode


if __name__ == "__main__":
    sys.exit(main())
