"""Whole shards over ranks: each input once, existing answers skipped, the same answers as in one process."""

import json
import os
import re
import shutil
import subprocess
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cnn2gnn_dist import cli
from cnn2gnn_dist.commands.answers import predict_shards
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference import editing
from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.inference.memory import store
from cnn2gnn_dist.inference.memory.view import Memory
from tests.support import runs
from tests.support.models import calibrate, pictures, write_model
from tests.support.runs import cnn2gnn
from tests.support.shards import encode_image


@pytest.fixture
def asked(tmp_path):
    """Five folders of three images, and a model."""
    for number in range(5):
        folder = tmp_path / f"part-{number}"
        folder.mkdir()
        for row, image in enumerate(pictures(3, seed=number)):
            (folder / f"{row}.png").write_bytes(encode_image(image))
    return write_model(tmp_path / "m"), [str(tmp_path / f"part-{n}") for n in range(5)]


def predict(model, out, inputs, rank, world):
    ranks = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    command = ("predict", "--model", str(model), *inputs, "--out", f"{out}/")
    return cnn2gnn(*command, **ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT="1")


def test_ranks_share_the_inputs_and_a_second_call_makes_what_is_missing(asked, tmp_path, capsys):
    model, inputs = asked
    out = tmp_path / "answers"
    ranks = [predict(model, out, inputs, rank, 2) for rank in range(2)]
    told = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    shares = [re.search(r": (\d+ images) of ", text) for text in told]
    assert sorted(share[1] for share in shares) == ["6 images", "9 images"]
    assert "(the share of rank 1 of 2)" in told[1]
    expected = Classifier.open(model, device="cpu").predict(inputs, top=3)
    found = [row for n in range(5) for row in pq.read_table(out / f"part-{n}.parquet").to_pylist()]
    assert [row["image"] for row in found] == [a.name for a in expected]
    np.testing.assert_array_equal(
        [row["probability"] for row in found], [a.probability for a in expected]
    )

    (out / "part-3.parquet").unlink()
    left = out / ".part-3.parquet.0123abcd.tmp"  # of a process that was killed
    left.touch()
    others = out / ".part-3.parquet.parquet.0123abcd.tmp"  # which a rank may be writing
    others.touch()
    call = ["predict", "--model", str(model), *inputs, "--out", f"{out}/"]
    assert cli.main(call) == 0
    assert "3 images of 1 input, 4 inputs were already answered" in capsys.readouterr().out
    assert not left.exists()
    assert others.exists()
    os.utime(tmp_path / "part-1" / "2.png", (1, 1))  # changed since it was answered
    assert cli.main(call) == 0
    assert "3 images of 1 input, 4 inputs were already answered" in capsys.readouterr().out
    assert cli.main([*call, "--top", "1"]) == 2
    assert "answers with other options: --top 3 there, 1 now\n" in capsys.readouterr().err
    assert cli.main(["memory", "remove", str(model), "img-1"]) == 0
    assert cli.main(call) == 2
    assert "answers from another version of its memory\n" in capsys.readouterr().err
    assert cli.main([*call, "--top", "5"]) == 2
    told = capsys.readouterr().err
    assert (
        "from another version of its memory and with other options: --top 3 there, 5 now\n" in told
    )


@pytest.mark.parametrize(
    ("note", "said"),
    [
        ({"top": 3, "coverage": 0.9}, "with other options: no --coverage there, 0.9 now"),
        ({"top": 5, "coverage": None}, "with other options: --top 3 there, 5 now"),
        ({"model": {"a": "2"}, "memory": "y"}, "from another model"),
        ({"memory": "y"}, "from another version of its memory"),
        (
            {"model": {}, "top": 1, "coverage": 0.5},
            "from another model and with other options: --top 3 there, 1 now; no --coverage there, 0.5 now",
        ),
    ],
)
def test_a_folder_with_other_answers_says_what_is_different(tmp_path, note, said):
    before = {"model": {"a": "1"}, "memory": "x", "top": 3, "coverage": None}
    predict_shards._check_note(tmp_path, before)
    with pytest.raises(UserError) as refused:
        predict_shards._check_note(tmp_path, before | note)
    assert refused.value.what == f"this folder has answers {said}"
    (tmp_path / predict_shards.NOTE).write_text(json.dumps(before | {"coverage": 0.5}))
    with pytest.raises(UserError, match=r"options: --coverage 0\.5 there, none now"):
        predict_shards._check_note(tmp_path, before)
    (tmp_path / predict_shards.NOTE).write_text("{")
    with pytest.raises(UserError, match=f"its {predict_shards.NOTE} can't be read"):
        predict_shards._check_note(tmp_path, before)


def answers(path):
    return [row["image"] for row in pq.read_table(path).to_pylist()]


def test_an_image_deep_in_a_folder_is_noticed(asked, tmp_path, capsys):
    model, inputs = asked
    (tmp_path / "part-0" / "deep").mkdir()
    call = ["predict", "--model", str(model), inputs[0], "--out", f"{tmp_path / 'out'}/"]
    assert cli.main(call) == 0
    new = tmp_path / "part-0" / "deep" / "3.png"
    new.write_bytes(encode_image(pictures(1, seed=9)[0]))
    os.utime(new, (1, 1))  # as if copied together with its time
    assert cli.main(call) == 0
    assert len(answers(tmp_path / "out" / "part-0.parquet")) == 4
    assert cli.main(call) == 0
    assert "1 input was already answered" in capsys.readouterr().out


def test_images_that_could_not_be_read_are_still_reported_when_resumed(asked, tmp_path, capsys):
    model, inputs = asked
    (tmp_path / "part-0" / "1.png").write_bytes(b"no image")
    absent = tmp_path / "absent.png"
    call = ["predict", "--model", str(model), *inputs[:2], str(absent)]
    call += ["--out", f"{tmp_path / 'out'}/"]
    for _ in range(2):
        assert cli.main(call) == 1
    told = capsys.readouterr()
    assert "0 images of 0 inputs, 3 inputs were already answered" in told.out
    assert f"{inputs[0]}: already answered, but 1 image could not be read" in told.err
    (tmp_path / "part-0" / "1.png").write_bytes(encode_image(pictures(1, seed=9)[0]))
    absent.write_bytes(encode_image(pictures(1, seed=8)[0]))
    os.utime(absent, (1, 1))  # as if copied together with its time
    assert cli.main(call) == 0
    assert "4 images of 2 inputs, 1 input was already answered" in capsys.readouterr().out


def test_answers_of_another_input_of_the_same_name_are_not_taken_for_its_own(
    asked, tmp_path, capsys
):
    model, inputs = asked
    other = tmp_path / "elsewhere" / "part-0"
    shutil.copytree(inputs[1], other)
    call = ["predict", "--model", str(model), "--out", f"{tmp_path / 'out'}/"]
    assert cli.main([*call, inputs[0]]) == 0
    assert cli.main([*call, str(other)]) == 2
    assert inputs[0] in capsys.readouterr().err
    assert answers(tmp_path / "out" / "part-0.parquet") == [
        f"{inputs[0]}/{n}.png" for n in range(3)
    ]
    shutil.rmtree(other)
    shutil.move(inputs[0], other)  # the same images, moved
    assert cli.main([*call, str(other)]) == 0
    assert "1 input was already answered" in capsys.readouterr().out


def test_an_input_that_looks_like_another_one_is_another_one(asked, tmp_path, capsys):
    """Of images without any detail, packed with fixed times, names, lengths and times agree."""
    model, _ = asked
    given = []
    for name, shade in (("a", 0), ("b", 255)):
        (tmp_path / name).mkdir()
        given.append(tmp_path / name / "x.bmp")
        Image.fromarray(np.full((16, 16, 3), shade, np.uint8)).save(given[-1])
        os.utime(given[-1], (0, 0))
    assert given[0].stat().st_size == given[1].stat().st_size
    call = ["predict", "--model", str(model), "--out", f"{tmp_path / 'out'}/"]
    assert cli.main([*call, str(given[0])]) == 0
    assert cli.main([*call, str(given[1])]) == 2
    assert f"another input of this name, {given[0]}" in capsys.readouterr().err
    assert answers(tmp_path / "out" / "x.bmp.parquet") == [str(given[0])]
    (tmp_path / "link").symlink_to(tmp_path / "a")  # the same one by another path
    assert cli.main([*call, str(tmp_path / "link" / "x.bmp")]) == 0
    assert "1 input was already answered" in capsys.readouterr().out


def test_a_path_through_a_file_costs_the_other_inputs_nothing(asked, tmp_path, capsys):
    model, inputs = asked
    call = ["predict", "--model", str(model), f"{inputs[0]}/0.png/b.png", inputs[1]]
    assert cli.main([*call, "--out", f"{tmp_path / 'out'}/"]) == 1
    told = capsys.readouterr()
    assert "0.png/b.png: not readable as an image: Not a directory" in told.err
    assert "4 images of 2 inputs" in told.out


def test_a_damaged_input_costs_the_others_nothing_and_is_named_at_the_end(asked, tmp_path, capsys):
    """Also if it comes first, or is damaged behind readable images."""
    model, inputs = asked
    cut, text = tmp_path / "cut.tar", tmp_path / "text.tar"
    with tarfile.open(cut, "w") as tar:
        for name in sorted(os.listdir(inputs[4])):
            tar.add(f"{inputs[4]}/{name}", name)
    whole = cut.read_bytes()
    cut.write_bytes(whole[: 1024 * 2 + 100])
    text.write_text("no shard" * 1000)
    out = tmp_path / "out"
    call = ["predict", "--model", str(model), str(cut), inputs[0], str(text), inputs[1]]
    call += ["--out", f"{out}/"]
    assert cli.main(call) == 1
    told = capsys.readouterr()
    assert f"answers  {out}: 6 images of 2 inputs\n" in told.out
    last = told.err[told.err.index("cnn2gnn: 2 inputs were not answered") :]
    for path in (cut, text):
        assert f"where:  {path}\n  remedy: copy or download it again" in last
    assert {path.name for path in out.glob("*.parquet")} == {"part-0.parquet", "part-1.parquet"}
    assert not list(out.glob(".*.tmp"))
    cut.write_bytes(whole)
    assert cli.main(call) == 1
    told = capsys.readouterr()
    assert f"answers  {out}: 3 images of 1 input, 2 inputs were already answered\n" in told.out
    assert "cnn2gnn: 1 input was not answered" in told.err
    assert answers(out / "cut.tar.parquet") == [f"{cut}/{n}.png" for n in range(3)]
    assert "from before it changed" not in told.err
    cut.write_bytes(whole[: 1024 * 2 + 100])
    assert cli.main(call) == 1
    told = capsys.readouterr().err
    assert told.count("from before it changed") == 1
    assert f"; the answers in {out}/cut.tar.parquet are from before" in told


def test_a_damaged_input_costs_the_other_ranks_nothing_under_torchrun(asked, tmp_path):
    """torchrun stops all ranks as soon as one exits with an error; here, long before the other is done."""
    model, inputs = asked
    (tmp_path / "cut.tar").write_text("no shard" * 1000)
    for number in range(3, 1500):
        os.link(f"{inputs[0]}/0.png", f"{inputs[0]}/{number}.png")
    command = [
        str(runs.BIN / "torchrun"),
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "cnn2gnn_dist",
        "predict",
    ]
    command += ["--model", str(model), str(tmp_path / "cut.tar"), inputs[0]]
    ended = subprocess.run(
        [*command, "--out", f"{tmp_path / 'out'}/"],
        env=runs.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert "cut.tar" in ended.stderr
    assert "1,500 images of 1 input (the share of rank 1 of 2)" in ended.stdout
    assert len(answers(tmp_path / "out" / "part-0.parquet")) == 1500


def test_what_is_no_fault_of_an_input_ends_the_job(asked, tmp_path, capsys, monkeypatch):
    model, inputs = asked

    def on_a_full_disk(*_: object, **__: object) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr(predict_shards.answered, "record", on_a_full_disk)
    call = ["predict", "--model", str(model), *inputs[:2], "--out", f"{tmp_path / 'out'}/"]
    assert cli.main(call) == 2
    assert "cnn2gnn: the disk is full" in capsys.readouterr().err
    assert not (tmp_path / "out" / "part-1.parquet").exists()


@pytest.mark.parametrize("scope", ["none", "batch", "dataset"])
def test_an_actor_does_not_answer_from_a_model_that_took_the_first_ones_place(scope, tmp_path):
    """As one that starts late, after an ``export --force``: a calibration changes answers, too."""
    folder = write_model(tmp_path / "m", scope)
    calibrate(folder)
    wanted = predict_shards.Asked(3, None)
    note = predict_shards._note(Classifier.open(folder, device="cpu"), wanted)
    assert callable(predict_shards.answering(folder, note, wanted))
    if scope == "dataset":
        calibrate(folder, count=50)
    else:
        shutil.rmtree(folder)
        write_model(folder, scope, seed=5)
    with pytest.raises(UserError, match="the model was replaced"):
        predict_shards.answering(folder, note, wanted)


def test_of_ranks_with_different_versions_one_goes_on(tmp_path):
    """However they meet: the first to write says which version the folder's answers are of."""
    count = 8
    for attempt in range(40):
        folder, meeting = tmp_path / str(attempt), threading.Barrier(count)
        folder.mkdir()

        def enter(version, folder=folder, meeting=meeting):
            meeting.wait()
            try:
                predict_shards._check_note(folder, {"memory": version})
            except UserError:
                return False
            return True

        with ThreadPoolExecutor(count) as pool:
            went_on = list(pool.map(enter, range(count)))
        assert sum(went_on) == 1
        note = json.loads((folder / predict_shards.NOTE).read_text())
        assert note == {"memory": went_on.index(True)}
        assert [path.name for path in folder.iterdir()] == [predict_shards.NOTE]


def test_a_memory_made_again_from_the_same_run_is_the_same(tmp_path):
    """A run without a model gets a new one for each command, with a different time."""
    memories = []
    for number in range(2):
        folder = write_model(tmp_path / str(number))
        note = folder / "memory" / "versions" / "000000" / "version.json"
        tree = json.loads(note.read_text()) | {
            "made": f"2026-01-0{number + 1}T00:00:00Z",
            "digest": None,
        }
        note.write_text(json.dumps(tree))
        memories.append(Memory.open(folder / "memory"))
    first, second = (store.digest(memory.root, memory.version) for memory in memories)
    assert first == second
    removed = Classifier.open(memories[0].root.parent, device="cpu")
    editing.remove(removed, ["img-1"])
    assert store.digest(memories[0].root, removed.memory.version) != first


def test_embeddings_say_which_images_could_not_be_read_and_why(asked, tmp_path, capsys):
    model, inputs = asked
    cut, text = tmp_path / "part-0" / "1.png", tmp_path / "part-0" / "2.png"
    cut.write_bytes(cut.read_bytes()[:-40])
    text.write_text("no image")
    out = tmp_path / "z.parquet"
    assert cli.main(["embed", "--model", str(model), inputs[0], "--out", str(out)]) == 1
    told = capsys.readouterr()
    assert f"embeddings  {out}: 1 image, 2 could not be read\n" in told.out
    why = [a.error for a in Classifier.open(model, device="cpu").predict(inputs[0])]
    assert "truncated" in why[1]
    assert f"{cut}: not readable as an image: {why[1]}\n" in told.err
    assert why[2] == "text, not an image"
    assert f"{text}: not readable as an image: text\n" in told.err
    rows = pq.read_table(out).to_pylist()
    assert [row["error"] for row in rows] == why
    assert [row["x"] is None for row in rows] == [False, True, True]


def test_embeddings_are_written(asked, tmp_path):
    model, inputs = asked
    out = tmp_path / "z.parquet"
    assert cli.main(["embed", "--model", str(model), inputs[0], "--out", str(out)]) == 0
    rows = pq.read_table(out).to_pylist()
    expected = list(Classifier.open(model, device="cpu").embed(inputs[0]))
    assert [row["image"] for row in rows] == [name for name, _, _ in expected]
    np.testing.assert_array_equal([row["z"] for row in rows], [z for _, _, z in expected])
