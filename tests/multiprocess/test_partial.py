"""The partial decoders, compiled and from a wheel: bit-identical to the full decoder, or no pixels at all."""

from __future__ import annotations

import contextlib
import ctypes.util
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from cnn2gnn_dist.data.images import decode as decoding
from cnn2gnn_dist.data.images import partial, turbo_crop
from cnn2gnn_dist.data.images.batch_views import fill_views
from cnn2gnn_dist.data.images.decode import CorruptSample, decode
from cnn2gnn_dist.data.images.turbo_crop import TurboCrop
from cnn2gnn_dist.data.images.views import ViewSpec
from cnn2gnn_dist.data.tar.samples import samples
from cnn2gnn_dist.errors import UserError
from tests.support import jpegs
from tests.support.shards import data_dir, random_images

SPEC = ViewSpec("random_resized_crop", 48, seed=5)


@pytest.fixture(scope="session")
def wheel() -> TurboCrop:
    """libjpeg-turbo 3 from a wheel or the system, whether or not it is faster here."""
    for name in turbo_crop._libraries():
        with contextlib.suppress(OSError, AttributeError):
            found = TurboCrop(name)
            assert turbo_crop.is_right(found)
            return found
    pytest.skip("no libturbojpeg 3: pip install 'cnn2gnn-dist[partial]'")


@pytest.fixture(scope="session", params=["compiled", "wheel"])
def either(request: pytest.FixtureRequest) -> Path | TurboCrop:
    """Both decoders, one after the other."""
    found: Path | TurboCrop = request.getfixturevalue(
        "library" if request.param == "compiled" else "wheel"
    )
    return found


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library built from the current source; skips where it can't be built."""
    try:
        return partial.build(tmp_path_factory.mktemp("partial") / "partial.so")
    except UserError as error:
        pytest.skip(f"no partial decode here: {error.what}")


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path | TurboCrop | None], None]]:
    """A function by which a test chooses the library in use, or none."""
    monkeypatch.delenv("CNN2GNN_PARTIAL", raising=False)
    monkeypatch.setattr(turbo_crop, "WORTH", 99)  # for every crop, however large

    def choose(chosen: Path | TurboCrop | None) -> None:
        turbo = chosen if isinstance(chosen, TurboCrop) else None
        path = chosen if isinstance(chosen, Path) else Path("/nowhere/partial.so")
        monkeypatch.setattr(partial, "path", lambda: path)
        monkeypatch.setattr(turbo_crop, "find", lambda: turbo)
        forget()

    yield choose
    monkeypatch.undo()
    forget()


def forget() -> None:
    partial._decoder.cache_clear()
    partial._turbo.cache_clear()


@pytest.fixture
def built(use, library) -> None:
    use(library)


@pytest.fixture
def there(use, either) -> None:
    use(either)


def assert_cut_right(data: bytes, top: int, left: int, high: int, wide: int) -> None:
    whole = simplejpeg.decode_jpeg(data)
    found = partial.crop(data, *whole.shape[:2], top, left, high, wide)
    assert found is not None
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, whole[top : top + high, left : left + wide])


@pytest.mark.parametrize("kind", jpegs.CUT)
def test_every_place_of_a_small_image(there, kind):
    image = jpegs.textured(41, 75)
    data = jpegs.CUT[kind](image)
    whole = simplejpeg.decode_jpeg(data)
    for high, wide in ((1, 1), (3, 17), (12, 2), (23, 40)):
        for top in range(41 - high + 1):
            for left in range(75 - wide + 1):
                found = partial.crop(data, 41, 75, top, left, high, wide)
                assert found is not None
                wanted = whole[top : top + high, left : left + wide]
                assert np.array_equal(found, wanted), (top, left, high, wide)


@pytest.mark.parametrize("kind", jpegs.CUT)
def test_any_size_and_crop(there, kind):
    rng = np.random.default_rng(1)
    sizes = [(1, 1), (1, 99), (99, 1), (2, 2), (7, 9), (8, 8), (16, 16), (17, 33), (64, 200)]
    sizes += [tuple(rng.integers(1, 260, 2)) for _ in range(12)]
    for number, (high, wide) in enumerate(sizes):
        data = jpegs.CUT[kind](jpegs.textured(high, wide, number))
        assert_cut_right(data, 0, 0, high, wide)
        for _ in range(25):
            top, left = int(rng.integers(high)), int(rng.integers(wide))
            h, w = int(rng.integers(high - top)) + 1, int(rng.integers(wide - left)) + 1
            assert_cut_right(data, top, left, h, w)


@pytest.mark.parametrize("kind", jpegs.WHOLE)
def test_what_others_must_decode(there, kind):
    image = jpegs.textured(60, 80)
    data = jpegs.WHOLE[kind](image)
    assert decode(data).shape == (60, 80, 3)
    assert partial.crop(data, 60, 80, 10, 10, 20, 20) is None


def both_ways(use, library, blobs: list[bytes], view: int = 0) -> tuple[np.ndarray, dict]:
    """Views with and without the extra: pixels and errors must be the same."""
    found = []
    for path in (None, library):
        use(path)
        images = np.full((len(blobs), SPEC.size, SPEC.size, 3), 77, np.uint8)
        wrong = fill_views(SPEC, blobs, np.arange(len(blobs)), view, images)
        found.append((images, {row: str(error) for row, error in wrong.items()}))
    assert found[0][1] == found[1][1]
    np.testing.assert_array_equal(found[0][0], found[1][0])
    return found[0]


def test_a_mixed_batch_is_the_same_with_and_without(use, either):
    kinds = [*jpegs.CUT.values(), *jpegs.WHOLE.values()]
    blobs = [encode(jpegs.textured(90 + i, 120 - i, i)) for i, encode in enumerate(kinds)]
    blobs += [b"", b"no image", blobs[0][:-30], blobs[1][:500]]
    for view in range(4):
        images, wrong = both_ways(use, either, blobs, view)
        assert sorted(wrong) == list(range(len(kinds), len(blobs)))
        assert (images[len(kinds) :] == 77).all()


def test_a_file_cut_anywhere_is_found_corrupt_either_way(use, either):
    """Cut in its header, in a comment that contains a complete JPEG, and after each byte of its data."""
    data = jpegs.with_exif(random_images(1, 40, 56)[0])
    start = data.index(b"\xff\xda", 2000)
    cuts = [*range(0, len(data), 97), *range(start, len(data))]
    inner = data.index(b"\xff\xd9") + 2  # the cut file ends as a complete one does
    assert inner < start
    blobs = [data[:cut] for cut in [*cuts, inner]]
    _, wrong = both_ways(use, either, blobs)
    assert len(wrong) == len(blobs)
    use(either)
    assert partial.crop(data, 40, 56, 0, 0, 8, 8) is not None
    for blob in blobs:
        assert partial.crop(blob, 40, 56, 0, 0, 8, 8) is None


def test_damage_is_never_taken_for_pixels_when_all_is_read(there):
    """A crop down to the last row gives the full decoder's pixels or is left to it, whatever the damage."""
    rng = np.random.default_rng(0)
    counts = {"same": 0, "left to the full decoder": 0}
    for kind in jpegs.CUT:
        data = np.frombuffer(jpegs.CUT[kind](jpegs.textured(48, 64)), np.uint8)
        for _ in range(150):
            damaged = data.copy()
            damaged[rng.integers(0, len(data), 2)] = rng.integers(0, 256, 2)
            blob = damaged.tobytes()
            found = partial.crop(blob, 48, 64, 5, 9, 43, 30)
            if found is not None:
                np.testing.assert_array_equal(found, simplejpeg.decode_jpeg(blob)[5:, 9:39])
            counts["left to the full decoder" if found is None else "same"] += 1
    assert min(counts.values()) > 50, counts


def test_damage_below_the_crop(use, either):
    """Overwritten bytes are detected, but not the zeros of a hole in the file, as the docstring says."""
    image = jpegs.textured(160, 160)
    data = bytearray(jpegs.by_pillow(image))
    noise = np.random.default_rng(0).integers(0, 256, 4096, np.uint8).tobytes()
    seen = bytes(data[:-6000]) + noise + bytes(data[-6000 + 4096 :])
    unseen = bytes(data[:-6000]) + bytes(4096) + bytes(data[-6000 + 4096 :])
    use(either)
    assert partial.crop(seen, 160, 160, 0, 0, 30, 30) is None
    found = partial.crop(unseen, 160, 160, 0, 0, 30, 30)
    np.testing.assert_array_equal(found, decode(bytes(data))[:30, :30])
    for blob in (seen, unseen):
        assert partial.crop(blob, 160, 160, 100, 0, 60, 160) is None
        with pytest.raises(CorruptSample):
            decode(blob)


@pytest.mark.parametrize("kind", ["420", "restarts by row"])
def test_a_marker_below_the_crop_that_does_not_belong_there(use, either, kind):
    data = jpegs.CUT[kind](jpegs.textured(160, 160))
    use(either)
    assert partial.crop(data, 160, 160, 0, 0, 30, 30) is not None
    at = len(data) - 4000
    for marker in (0xC4, 0xDA, 0xD9, 0xD8, 0xD3, 0x01):
        damaged = data[:at] + bytes((0xFF, marker)) + data[at + 2 :]
        assert (partial.crop(damaged, 160, 160, 0, 0, 30, 30) is None) == (
            marker != 0xD3 or kind != "restarts by row"
        )
    for last in (b"\xff\xd8", b"\xff\x00", b"\xff\xff", b"\x00\xd9", b""):
        assert partial.crop(data[:-2] + last, 160, 160, 0, 0, 30, 30) is None


@pytest.mark.parametrize(
    "box", [(0, 0, 41, 1), (40, 0, 1, 1), (0, 60, 1, 1), (0, 0, 0, 5), (2**32 - 1, 0, 2, 2)]
)
def test_a_box_outside_is_refused(built, box):
    data = jpegs.by_pillow(jpegs.textured(40, 60))
    decode_into = partial._decoder()
    out = np.full((50, 70, 3), 9, np.uint8)
    assert decode_into(data, len(data), 40, 60, *box, out.ctypes.data) != 0
    assert (out == 9).all()


def test_the_size_must_be_the_images(there):
    data = jpegs.by_pillow(jpegs.textured(40, 60))
    assert partial.crop(data, 40, 61, 0, 0, 5, 5) is None
    assert partial.crop(data, 39, 60, 0, 0, 5, 5) is None
    assert partial.crop(data, 60, 40, 0, 0, 5, 5) is None


def test_nothing_is_written_beside_the_crop(built):
    data = jpegs.by_pillow(jpegs.textured(64, 64))
    decode_into = partial._decoder()
    for box in ((0, 0, 64, 64), (10, 20, 30, 44), (63, 63, 1, 1), (0, 5, 64, 7)):
        count = box[2] * box[3] * 3
        out = np.full(count + 512, 201, np.uint8)
        assert decode_into(data, len(data), 64, 64, *box, out[256:].ctypes.data) == 0
        assert (out[:256] == 201).all()
        assert (out[256 + count :] == 201).all()


def test_from_many_threads(there):
    blobs = [jpegs.CUT[kind](jpegs.textured(200, 300, i)) for i, kind in enumerate(jpegs.CUT)]
    whole = [simplejpeg.decode_jpeg(blob) for blob in blobs]
    wrong = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(60):
            i, top, left = (int(n) for n in rng.integers([len(blobs), 150, 250]))
            found = partial.crop(blobs[i], 200, 300, top, left, 50, 50)
            if not np.array_equal(found, whole[i][top : top + 50, left : left + 50]):
                wrong.append((i, top, left))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_real_photographs(use, either):
    shards = sorted(data_dir("imagenet-sample").rglob("*.tar"))
    if not shards:
        pytest.skip("no shards in imagenet-sample")
    blobs = []
    for shard in shards:
        with open(shard, "rb") as file:
            for sample in samples(shard):
                file.seek(sample.fields["jpg"].offset)
                blobs.append(file.read(sample.fields["jpg"].size))
    rng = np.random.default_rng(0)
    by_extra = 0
    use(either)
    for data in blobs:
        whole = decode(data)
        high, wide = whole.shape[:2]
        for _ in range(3):
            h, w = int(rng.integers(1, high + 1)), int(rng.integers(1, wide + 1))
            top, left = int(rng.integers(high - h + 1)), int(rng.integers(wide - w + 1))
            found = partial.crop(data, high, wide, top, left, h, w)
            by_extra += found is not None
            if found is not None:
                np.testing.assert_array_equal(found, whole[top : top + h, left : left + w])
    assert by_extra > 2.8 * len(blobs)  # only a few are progressive or have trailing data
    _, wrong = both_ways(use, either, blobs, 3)
    assert not wrong


def test_the_switch_turns_it_off(use, either, monkeypatch):
    data = jpegs.by_pillow(jpegs.textured(40, 60))
    use(either)
    assert partial.crop(data, 40, 60, 0, 0, 8, 8) is not None
    monkeypatch.setenv("CNN2GNN_PARTIAL", "0")
    forget()
    assert partial.crop(data, 40, 60, 0, 0, 8, 8) is None
    assert decoding.decode_crop(data, (40, 60), 3, 4, 8, 8).shape == (8, 8, 3)


def test_a_library_that_is_invalid_or_wrong_is_not_used(use, library, tmp_path, monkeypatch):
    data = jpegs.by_pillow(jpegs.textured(40, 60))
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    use(broken)
    with pytest.warns(UserWarning, match="not used"):
        assert partial.crop(data, 40, 60, 0, 0, 8, 8) is None
    source = tmp_path / "partial.c"
    right = "#define MARGIN_COLUMNS 16"
    assert right in partial.SOURCE.read_text()
    source.write_text(partial.SOURCE.read_text().replace(right, "#define MARGIN_COLUMNS 0"))
    monkeypatch.setattr(partial, "SOURCE", source)
    with pytest.raises(UserError, match="differ from those of the full decoder"):
        partial.build(tmp_path / "wrong.so")
    assert not (tmp_path / "wrong.so").exists()
    wrong = partial.build(tmp_path / "unchecked.so", "-DUNCHECKED")
    use(wrong)
    with pytest.warns(UserWarning, match="differ from those of the full decoder"):
        assert partial.crop(data, 40, 60, 0, 0, 8, 8) is None


def test_a_crop_of_most_of_the_image_is_left_to_the_full_decoder(wheel):
    data = jpegs.by_pillow(jpegs.textured(100, 100))
    assert wheel(data, 100, 100, 0, 0, 100, 100) is None
    assert wheel(data, 100, 100, 20, 0, 80, 100) is None
    found = wheel(data, 100, 100, 10, 10, 30, 30)
    np.testing.assert_array_equal(found, decode(data)[10:40, 10:40])


@pytest.mark.parametrize("box", [(-1, 0, 5, 5), (0, 96, 5, 5), (96, 0, 5, 5), (0, 0, 0, 5)])
def test_a_box_outside_is_refused_by_the_wheel_too(wheel, box):
    assert wheel.cut(jpegs.by_pillow(jpegs.textured(100, 100)), 100, 100, *box) is None


def test_a_library_that_is_old_or_slow_or_wrong_is_not_used(wheel, tmp_path, monkeypatch):
    (tmp_path / "none.so").write_bytes(b"no library")
    old = ctypes.util.find_library("c")
    monkeypatch.setattr(turbo_crop, "_libraries", lambda: [str(tmp_path / "none.so"), old])
    assert turbo_crop.find() is None
    monkeypatch.setattr(turbo_crop, "_libraries", lambda: [wheel.library])
    monkeypatch.setattr(turbo_crop, "_pays", lambda crop: True)
    assert turbo_crop.find().library == wheel.library
    monkeypatch.setattr(turbo_crop, "MARGIN_COLUMNS", 0)
    assert turbo_crop.find() is None
    monkeypatch.setattr(turbo_crop, "MARGIN_COLUMNS", 16)
    monkeypatch.setattr(turbo_crop, "_pays", lambda crop: False)
    assert turbo_crop.find() is None
