"""Tar archives built block by block, such as ``tarfile`` would not write, and their samples by webdataset."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from itertools import product
from pathlib import Path

from hypothesis import strategies as st
from webdataset import tariterators

END = bytes(1024)
Samples = list[tuple[str, dict[str, bytes]]]


def by_webdataset(path: Path) -> Samples:
    """Keys and fields of the samples that webdataset makes of a shard."""
    found = tariterators.tarfile_samples([{"url": str(path)}])
    return [
        (s["__key__"], {k: v for k, v in s.items() if k not in ("__key__", "__url__")})
        for s in found
    ]


def octal(number: int, width: int) -> bytes:
    return b"%0*o\0" % (width - 1, number)


def base256(number: int, width: int) -> bytes:
    return (b"\xff" if number < 0 else b"\x80") + (number % 256 ** (width - 1)).to_bytes(
        width - 1, "big"
    )


def repair(block: bytes) -> bytes:
    """A header block with its checksum corrected."""
    total = sum(block[:148]) + sum(block[156:512]) + 8 * 32
    return block[:148] + b"%06o\0 " % total + block[156:512]


def header(
    name: bytes,
    size: int | bytes = 0,
    kind: bytes = b"0",
    *,
    prefix: bytes = b"",
    magic: bytes = b"ustar\x0000",
    owner: bytes = octal(0, 8),
    mtime: bytes = octal(0, 12),
    device: bytes = bytes(16),
) -> bytes:
    """A header block; ``size`` as a number, or as its 12 bytes."""
    size_field = octal(size, 12) if isinstance(size, int) else size.ljust(12, b"\0")
    block = name[:100].ljust(100, b"\0") + octal(0o644, 8) + owner + octal(0, 8) + size_field
    block += mtime + bytes(8) + kind + bytes(100) + magic.ljust(8, b"\0") + bytes(64) + device
    return repair((block + prefix[:155]).ljust(512, b"\0"))


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def record(keyword: bytes, value: bytes) -> bytes:
    """A pax record, which contains its own length."""
    length = len(keyword) + len(value) + 3
    while len(b"%d" % length) + len(keyword) + len(value) + 3 != length:
        length = len(b"%d" % length) + len(keyword) + len(value) + 3
    return b"%d %s=%s\n" % (length, keyword, value)


def pax(records: dict[bytes, bytes], kind: bytes = b"x") -> bytes:
    data = b"".join(record(k, v) for k, v in records.items())
    return header(b"PaxHeaders/x", len(data), kind) + padded(data)


def gnu(name: bytes, kind: bytes = b"L") -> bytes:
    data = name + b"\0"
    return header(b"././@LongLink", len(data), kind, magic=b"ustar  \0") + padded(data)


def file(name: bytes, data: bytes = b"", kind: bytes = b"0", **fields: bytes) -> bytes:
    return header(name, len(data), kind, **fields) + padded(data)  # type: ignore[arg-type]


PARTS = [b"a", b"b", b"ab", b"A", "n01_é".encode(), b".hidden", b"..", b"__m__", b"__x", b"v2"]
PARTS += [b"\xe9", b"x y", b"a\nb", b"____", b"__bad__", b"._a", b"BZh9", b"n" * 60]
SUFFIXES = [b"jpg", b"JPG", b"cls", b"json", b"seg.png", b"Seg.PNG", b"", b"v2_3.jpg", b"__KEY__"]
SUFFIXES += [b"__bad__", b"__url__", b"__local_path__", b"pyd", "ÉÄ".encode(), b"j\np", b"jpg/"]
FOLDERS = [b"", b"", b"", b"./", b"/", b"../", b"dir/", b"dir.x/", b"__m__/", b".git/", b"d\n/"]

# One choice per name, not three: such a test spends its time on hypothesis' choices.
names = st.one_of(
    st.sampled_from([b"%b%b.%b" % choice for choice in product(FOLDERS, PARTS, SUFFIXES)]),
    st.sampled_from([b"%b%b" % choice for choice in product(FOLDERS, PARTS)]),
    st.text("aB./_\n", min_size=1, max_size=12).map(str.encode),
)
payloads = st.one_of(st.just(b""), st.binary(max_size=20), st.just(b"p" * 512), st.just(b"q" * 700))
ODD_FIELDS = {
    "magic": [b"ustar  \0", b"", b"ustar\x0000"],
    "prefix": [b"pre", b"pre.d/x", b"__p__", b"14231234567\0"],
    "owner": [base256(1 << 30, 8), b" " * 8, b"   123 \0", b"0000755 "],
    "mtime": [base256(-5, 12), b" " * 12, b"14231234567 "],
    "device": [b"0000000\0" * 2, b"000000 \0" * 2, b"    \0\0\0\0" * 2],
}
# Up to four fields are odd; if a field is chosen twice, the last choice counts.
odd_fields = st.lists(
    st.sampled_from([(name, value) for name, values in ODD_FIELDS.items() for value in values]),
    max_size=4,
).map(dict)


def extension(draw: st.DrawFn, piece: str, name: bytes, other: bytes, size: bytes) -> bytes:
    """The extension header of one kind, with its data."""
    match piece:
        case "L" | "K":
            return gnu(other, piece.encode())
        case "path":
            return pax({b"path": other})
        case "size":
            return pax({b"mtime": b"1.5", b"size": size})
        case "other":
            return pax({b"comment": b"a=b\nc", b"LIBARCHIVE.x": b""})
        case "X":
            return pax({b"path": other, b"size": size}, b"X")
        case _:
            records = draw(st.sampled_from([{b"comment": b"x"}] * 5 + [{b"path": name}]))
            return pax(records, b"g")


@st.composite
def regular(draw: st.DrawFn) -> bytes:
    """A member with the extension headers before it, its name and size encoded in one of many ways."""
    name, data = draw(names), draw(payloads)
    kind = draw(st.sampled_from([b"0"] * 6 + [b"\0", b"7"]))
    pieces = draw(
        st.lists(st.sampled_from(["L", "K", "path", "size", "other", "X", "g"]), max_size=3)
    )
    out, told = b"", False
    for piece in pieces:
        other = draw(names)
        told = told or piece in ("size", "X")
        out += extension(draw, piece, name, other, b"%d" % len(data))
    sizes = [octal(len(data), 12), base256(len(data), 12), b"%11o " % len(data)]
    if told:
        sizes += [octal(0, 12), octal(5, 12)]  # the pax record wins
    if kind == b"\0" and name[:100].endswith(b"/"):
        data, sizes = b"", [octal(9, 12)]  # a folder, whose size is ignored
    head = header(name, draw(st.sampled_from(sizes)), kind, **draw(odd_fields))
    return out + head + padded(data)


@st.composite
def special(draw: st.DrawFn) -> bytes:
    """A link, device, folder or pipe (whose size is ignored), or a member of unknown type."""
    name, data = draw(names), draw(payloads)
    if draw(st.booleans()):
        return header(name, len(data), draw(st.sampled_from([b"%d" % i for i in range(1, 7)])))
    return file(name, data, draw(st.sampled_from([b"V", b"M", b"D", b"Z"])))


archives = st.lists(st.one_of(regular(), regular(), regular(), special()), max_size=7).map(
    lambda members: b"".join(members) + END
)


def shard(folder: Path, *members: bytes) -> Path:
    path = folder / "shard.tar"
    path.write_bytes(b"".join(members) + END)
    return path


def peak_of(work: Callable[[], object]) -> int:
    """Peak bytes allocated by Python during the work."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
