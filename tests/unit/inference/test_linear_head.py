"""The linear head compared with scikit-learn's logistic regression."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from cnn2gnn_dist.inference.audit import linear_head
from cnn2gnn_dist.inference.audit.linear_head import fit_head, head_probabilities


def data(count: int = 400, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, count)
    x = rng.normal(size=(classes, 9))[labels] + rng.normal(size=(count, 9))
    return (x * np.geomspace(0.1, 10, 9) + 3).astype(np.float32), labels


@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_the_minimum_is_that_of_scikit_learn(l2):
    x, labels = data()
    found = fit_head(x, labels, 4, l2=l2).probabilities(x)
    standard = StandardScaler().fit_transform(x)
    other = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=5000).fit(standard, labels)
    np.testing.assert_allclose(found, other.predict_proba(standard), atol=2e-3)


def test_rows_without_a_label_and_classes_without_rows():
    x, labels = data()
    kept = labels != 2
    some = np.where(kept, labels, -1)
    a = fit_head(x, some, 4).probabilities(x)
    b = fit_head(x[kept], labels[kept], 4).probabilities(x)
    np.testing.assert_array_equal(a, b)
    assert a[:, 2].max() < 0.02
    with pytest.raises(ValueError, match="no image has a label"):
        fit_head(x, np.full(len(x), -1), 4)


def test_folds_do_not_see_their_own_labels():
    x, labels = data(300)
    found = head_probabilities(x, labels, 4, folds=5)
    fold = np.random.default_rng(0).permutation(300) % 5
    changed = labels.copy()
    changed[fold == 2] = (labels[fold == 2] + 1) % 4
    again = head_probabilities(x, changed, 4, folds=5)
    np.testing.assert_array_equal(found[fold == 2], again[fold == 2])
    assert np.abs(found[fold != 2] - again[fold != 2]).max() > 0.01
    with pytest.raises(ValueError, match="folds = 1"):
        head_probabilities(x, labels, 4, folds=1)


def test_a_large_set_is_sampled(monkeypatch):
    x, labels = data(2000)
    whole = fit_head(x, labels, 4).probabilities(x).argmax(1)
    monkeypatch.setattr(linear_head, "MOST_IMAGES", 500)
    assert (fit_head(x, labels, 4).probabilities(x).argmax(1) == whole).mean() > 0.95
