"""``cnn2gnn memory``: what it says about what it was given."""

from cnn2gnn_dist import cli
from tests.support.models import pictures, write_model
from tests.support.shards import encode_image


def test_add_names_the_files_that_it_leaves_out(tmp_path, capsys):
    model, folder = write_model(tmp_path / "m"), tmp_path / "photos"
    folder.mkdir()
    for number, image in enumerate(pictures(3, seed=60)):
        (folder / f"{number}.png").write_bytes(encode_image(image))
        (folder / f"{number}.heic").write_bytes(b"a phone's own format")
    assert cli.main(["memory", "add", str(model), str(folder), "--class", "class 1"]) == 0
    told = capsys.readouterr()
    assert "adding 3 images" in told.out
    assert f"{folder}: left out: 3 .heic" in told.err
