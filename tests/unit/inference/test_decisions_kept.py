"""The relabel list of its training in a model's memory."""

from cnn2gnn_dist.inference import editing
from cnn2gnn_dist.inference.memory import decisions

LINES = [("a/img-3", "class 1", "img-3"), ("b,x", "drop", ""), ("img-5", "class 0", "img-5")]


def test_a_forgotten_image_has_no_line(model):
    root = model.memory.root
    decisions.record(root, LINES)
    assert decisions.listed(root) == LINES
    editing.forget(model, ["img-3", "img-4"])
    assert decisions.listed(root) == LINES[1:]
    decisions.record(root, LINES[2:])
    editing.forget(model, ["img-5"])
    assert decisions.listed(root) == []
    assert not (root / decisions.FILE).exists()
