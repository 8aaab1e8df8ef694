"""Inputs of a model: damaged collections, other kinds of files, and nothing at all."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cnn2gnn_dist import cli
from cnn2gnn_dist.data.images import image_files
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference import inputs
from tests.support.models import pictures
from tests.support.shards import encode_image

PNG = encode_image(pictures(1)[0])


def tar_of(path, names):
    with tarfile.open(path, "w") as tar:
        for name in names:
            about = tarfile.TarInfo(name)
            about.size = len(PNG)
            tar.addfile(about, io.BytesIO(PNG))
    return path


def parquet_of(path, values, kind=None):
    pq.write_table(pa.table({"image": pa.array(values, kind)}), path)
    return path


def test_text_in_a_parquet_file_is_not_taken_for_a_path(model, tmp_path):
    (tmp_path / "secret.png").write_bytes(PNG)
    rows = [{"bytes": str(tmp_path / "secret.png"), "path": "a"}]
    with pytest.raises(UserError, match="none of these columns holds images"):
        model.predict(parquet_of(tmp_path / "a.parquet", rows))


def test_rows_without_bytes_are_errors_and_the_others_answered(model, tmp_path):
    rows = [{"bytes": PNG, "path": "a"}, {"bytes": None, "path": "secret.png"}, None]
    answers = model.predict(parquet_of(tmp_path / "a.parquet", rows))
    assert [a.error for a in answers] == [None, *["this row contains no bytes"] * 2]


@pytest.mark.parametrize("kind", [pa.binary(), pa.binary_view(), None], ids=str)
def test_the_image_column_of_a_parquet_file_is_found_by_its_name_as_in_training(
    model, tmp_path, kind
):
    mask, image = (encode_image(one) for one in pictures(2))
    given = image if kind else {"bytes": image, "path": "a"}
    first = {"mask": pa.array([mask]), "mask_too": pa.array([{"bytes": mask, "path": "a"}])}
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({**first, "image.x": [mask], "image": pa.array([given], kind)}), path)
    assert model.predict(path)[0].classes == model.predict(image).classes


def test_of_several_image_columns_none_is_guessed(model, tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"mask": [PNG], "photo": [PNG]}), path)
    with pytest.raises(UserError, match="2 of these columns may hold the images: mask, photo"):
        model.predict(path)
    one = pa.array([{"bytes": PNG, "path": "a"}])
    pq.write_table(pa.table({"hash": [b"0123"], "photo": one}), path)
    assert model.predict(path)[0].error is None


def test_collections_without_images_are_refused(model, tmp_path):
    for path in (
        tar_of(tmp_path / "a.tar", ["a.txt"]),
        parquet_of(tmp_path / "a.parquet", [], pa.binary()),
    ):
        with pytest.raises(UserError, match="no image in this"):
            model.predict(path)


@pytest.mark.parametrize("suffix", ["tar.gz", "tgz", "tar.bz2", "tar.xz"])
def test_compressed_shards_are_shards(model, tmp_path, suffix):
    plain = tar_of(tmp_path / "a.tar", ["0.png", "sub/1.png"])
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(pack[suffix.removeprefix("tar.").replace("tgz", "gz")](plain.read_bytes()))
    expected, found = model.predict(plain), model.predict(path)
    assert [a.name for a in found] == [f"{path}/0.png", f"{path}/sub/1.png"]
    assert [a.probability for a in found] == [a.probability for a in expected]


@pytest.mark.parametrize(
    "kind",
    [
        "cut",
        "cut in a header",
        "cut between",
        "gzip cut",
        "gzip damaged",
        "text",
        "empty",
        "missing",
    ],
)
def test_shards_that_cannot_be_read(model, tmp_path, kind):
    path = tar_of(tmp_path / "a.tar", [f"{n}.png" for n in range(30)])
    data, packed = path.read_bytes(), gzip.compress(path.read_bytes())
    made = {
        "cut": data[: 10 * 1024 + 700], "cut in a header": data[: 10 * 1024 + 100],
        "cut between": data[: 10 * 1024], "gzip cut": packed[:-40],
        "gzip damaged": packed[:200] + b"zzzz" + packed[204:], "text": b"<html>" * 300, "empty": b"",
    }  # fmt: skip
    path.unlink() if kind == "missing" else path.write_bytes(made[kind])
    with pytest.raises(UserError) as caught:
        model.predict(path)
    assert caught.value.where == str(path)
    assert "\n" not in caught.value.what
    assert caught.value.remedy


@pytest.mark.parametrize(("count", "behind"), [(1, "1 image"), (2, "2 images")])
def test_a_cut_shard_says_how_many_images_came_before(model, tmp_path, count, behind):
    path = tar_of(tmp_path / "a.tar", [f"{n}.png" for n in range(30)])
    path.write_bytes(path.read_bytes()[: count * 1024 + 100])
    with pytest.raises(UserError, match=f"can't be read after its first {behind}: "):
        model.predict(path)


def test_a_damaged_parquet_file(model, tmp_path):
    path = parquet_of(tmp_path / "a.parquet", [{"bytes": PNG, "path": "a"}] * 3)
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"\xff" * 30 + data[34:])
    with pytest.raises(UserError, match="this Parquet file can't be read"):
        model.predict(path)


def test_devices_and_endless_files_are_errors(model, tmp_path, monkeypatch):
    answers = model.predict(["/dev/zero", "/dev/null"])
    assert [a.error for a in answers] == ["a device, not a file"] * 2
    monkeypatch.setattr(image_files, "MAX_BYTES", 1000)
    monkeypatch.setattr(inputs, "MAX_BYTES", 1000)
    (tmp_path / "a.png").write_bytes(bytes(1001))
    assert model.predict(tmp_path / "a.png").error.endswith("too large for an image")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        about = tarfile.TarInfo("a.png")
        about.size = 1001
        tar.addfile(about, io.BytesIO(bytes(1001)))
    assert model.predict(tmp_path / "a.tar")[0].error.endswith("too large for an image")


def test_a_sparse_terabyte_is_not_read(model, tmp_path):
    with open(tmp_path / "a.png", "wb") as file:
        os.truncate(file.fileno(), 1 << 40)
    assert model.predict(tmp_path / "a.png").error == "more than 1.5 GB, too large for an image"


def test_names_hold_no_line_ends(model, tmp_path):
    (tmp_path / "a\nb\x1b.png").write_bytes(PNG)
    assert model.predict(tmp_path)[0].name == f"{tmp_path}/a\\x0ab\\x1b.png"
    tar = tar_of(tmp_path / "s.tar", ["x\ny.png", "caf\udce9.png"])
    names = [a.name for a in model.predict(tar)]
    assert names == [f"{tar}/x\\x0ay.png", f"{tar}/caf\\xe9.png"]


def test_a_page_does_not_wait_for_a_pipe_that_was_read(model, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    keep = os.open(pipe, os.O_RDWR)
    os.write(keep, PNG)
    from cnn2gnn_dist.commands.answers.answer_files import writer_of
    from cnn2gnn_dist.inference.answers import Answer

    with writer_of(tmp_path / "a.html") as write:
        write(Answer(str(pipe), "class 0", 1.0))
    os.close(keep)
    assert "<span class=none>" in (tmp_path / "a.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "none/a.csv"], "the folder does not exist"),
        (["--out", "/proc/a.csv"], "this file can't be written to"),
        (["--out", "a.png/"], "this folder can't be written to"),
        (["--out", "sub.csv/"], "answers  sub.csv: 1 image of 1 input"),
        (["--coverage", "0.9", "--together"], "answered one by one"),
    ],
)
def test_where_answers_cannot_go(model, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(PNG)
    code = cli.main(["predict", "--model", str(model.folder), "a.png", *arguments])
    told = capsys.readouterr()
    assert message in told.out + told.err
    assert code == (0 if message.startswith("answers") else 2)


def test_the_folder_one_is_in_is_answered_under_its_name(model, tmp_path, monkeypatch):
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    (tmp_path / "photos" / "a.png").write_bytes(PNG)
    for inside, given in (("photos", "."), ("photos/sub", "..")):
        monkeypatch.chdir(tmp_path / inside)
        out = tmp_path / inside.replace("/", "-")
        assert cli.main(["predict", "--model", str(model.folder), given, "--out", f"{out}/"]) == 0
        assert pq.read_table(out / "photos.parquet").num_rows == 1


def test_embeddings_that_cannot_be_written_and_models_that_are_not_there(model, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(PNG)
    call = ["embed", "--model", str(model.folder), str(tmp_path / "a.png"), "--out"]
    assert cli.main([*call, str(tmp_path / "none" / "a.parquet")]) == 2
    assert "this file can't be written to" in capsys.readouterr().err
    assert cli.main(["predict", "--model", str(tmp_path / "none"), "a.png"]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_exports_that_are_refused_create_nothing(model, tmp_path, capsys):
    def export(source, target, *more):
        return cli.main(["export", str(source), "--to", str(target), *more])

    assert export(tmp_path / "none", tmp_path / "a" / "b") == 2
    assert not (tmp_path / "a").exists()
    assert export(model.folder, model.folder / "inside") == 2
    assert "inside the model itself" in capsys.readouterr().err
    assert export(model.folder, "/proc/a") == 2
    assert "can't be written to" in capsys.readouterr().err
    (tmp_path / ".e.old" / "left").mkdir(parents=True)  # left by an export that was killed
    assert export(model.folder, tmp_path / "e") == 0
    assert export(model.folder, tmp_path / "e", "--force") == 0
    assert not (tmp_path / ".e.old").exists()


def test_two_processes_that_write_the_same_answers_do_not_mix_them(tmp_path):
    """Such as an actor that Ray has given up because its node is cut off, and the one that took its input."""
    from cnn2gnn_dist.commands.answers.answer_files import writer_of
    from cnn2gnn_dist.inference.answers import Answer

    path, answers = tmp_path / "a.jsonl", [Answer(f"{number}.png") for number in range(3)]

    def names():
        return [json.loads(line)["image"] for line in path.read_text().splitlines()]

    with writer_of(path, shared=True) as given_up:
        given_up(answers[0])
        with writer_of(path, shared=True) as write:
            for answer in answers:
                write(answer)
        assert names() == ["0.png", "1.png", "2.png"]
        given_up(answers[1])
        given_up(answers[2])
    assert names() == ["0.png", "1.png", "2.png"]
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
