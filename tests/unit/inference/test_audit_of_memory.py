"""What an audit reads of a memory, also while the memory is edited."""

import numpy as np

from cnn2gnn_dist.inference import editing
from cnn2gnn_dist.inference.audit.memory import Thumbnails, training_set
from cnn2gnn_dist.inference.classifier import Classifier
from tests.support.models import pictures
from tests.support.shards import encode_image


def test_a_compaction_meanwhile_takes_no_picture_away(model):
    editing.remove(model, ["img-1", "img-39"])
    reader = Classifier.open(model.folder, device="cpu")
    shown = Thumbnails(reader.memory)
    editing.compact(model)  # deletes the files that the reader has opened
    kept = [row for row in range(40) if row not in (1, 39)]
    expected = [encode_image(image) for image in pictures(40)[kept]]
    blocks = list(shown.blocks(16))
    assert [len(block) for block in blocks] == [16, 16, 6]
    assert [one for block in blocks for one in block] == expected
    assert shown.any
    assert shown.jpegs([0, 1, 37]) == [expected[0], expected[1], expected[37]]
    look = shown.look(np.array([37, 0]))
    assert (look.reshape(2, -1).std(1) > 0).all()
    np.testing.assert_array_equal(training_set(reader.memory).labels_N, np.array(kept) % 3)
