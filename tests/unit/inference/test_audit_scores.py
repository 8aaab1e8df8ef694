"""The audit's figures compared with loops over all pairs, and on data whose faults are known."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from cnn2gnn_dist.inference.audit import scores as audit_scores
from cnn2gnn_dist.inference.audit.linear_head import head_probabilities


def unit_rows(count: int, dim: int, seed: int = 0) -> np.ndarray:
    z = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def all_pairs(z_Nd: np.ndarray, k: int, twin_N: np.ndarray) -> list[list[int]]:
    """The k nearest other rows of each row, by squared distances of all pairs in float64."""
    found = []
    for i, row in enumerate(z_Nd.astype(np.float64)):
        far = ((z_Nd - row) ** 2).sum(1)
        good = [j for j in range(len(z_Nd)) if twin_N[j] != twin_N[i] and z_Nd[j].any()]
        found.append(sorted(good, key=lambda j: (far[j], j))[:k] if row.any() else [])
    return found


@pytest.mark.parametrize(("count", "k"), [(60, 5), (60, 1), (12, 30), (2, 3), (1, 2)])
@pytest.mark.parametrize("from_table", [False, True])
def test_neighbours_leave_out_the_image_its_twins_and_the_unreadable(count, k, from_table):
    z = unit_rows(count, 8)
    twin = np.arange(count)
    if count > 10:
        z[[3, 7, 9]] = z[1]
        twin[[3, 7, 9]] = 1
        z[4] = 0
    if from_table:
        table = np.stack([np.roll(np.arange(count), -i)[1:] for i in range(count)])
        table = np.concatenate([table, np.full((count, 1), -1)], axis=1).astype(np.int32)
        ids, far = audit_scores.table_neighbours(z, table, k, twin)
    else:
        ids, far = audit_scores.neighbours(z, k, twin)
    assert ids.shape == far.shape == (count, k)
    for i, near in enumerate(all_pairs(z, k, twin)):
        # Twins are at equal distances from other rows, up to rounding: compare distances, not ids.
        given = ids[i][ids[i] >= 0]
        assert len(given) == len(near)
        assert not np.isin(twin[given], twin[i]).any()
        np.testing.assert_allclose(far[i, : len(near)], ((z[near] - z[i]) ** 2).sum(1), atol=1e-5)
        np.testing.assert_allclose(far[i, : len(near)], ((z[given] - z[i]) ** 2).sum(1), atol=1e-5)
        assert np.isinf(far[i, len(near) :]).all()


def test_neighbours_in_another_set():
    base, query = unit_rows(50, 6), unit_rows(7, 6, seed=1)
    base[5], query[2] = 0, 0
    ids, far = audit_scores.Nearest(base)(query, 4)
    for row in range(7):
        want = np.argsort(((base - query[row]) ** 2).sum(1) + 9 * ~base.any(1), kind="stable")[:4]
        np.testing.assert_array_equal(ids[row], want if row != 2 else [-1] * 4)
    assert np.isinf(far[2]).all()
    few, _ = audit_scores.Nearest(base[:3])(query, 5)
    assert (few[:, 3:] == -1).all()


def test_vote_is_the_closed_form_of_adaptive_neighbours():
    rng = np.random.default_rng(3)
    far = np.sort(rng.random((40, 7)), axis=1).astype(np.float32)
    ids = np.stack([rng.choice(40, 7, replace=False) for _ in range(40)])
    labels = rng.integers(0, 4, 40)
    ids[5, 4:], far[5, 4:] = -1, np.inf
    ids[6], far[6] = -1, np.inf
    votes = audit_scores.vote(ids, audit_scores.vote_weights(far), labels, 4)
    for i in range(40):
        want = np.zeros(4)
        d = far[i].astype(np.float64)
        for place in range(7):
            if ids[i, place] >= 0:
                gap = d[6] - d[place] if i != 5 else 1.0  # fewer than k + 1: uniform
                want[labels[ids[i, place]]] += gap
        want = want / want.sum() if want.sum() else np.full(4, 0.25)
        np.testing.assert_allclose(votes[i], want, atol=1e-5)
    np.testing.assert_allclose(votes[:, :].sum(1), 1, atol=1e-5)
    some = audit_scores.vote(ids[10:20], audit_scores.vote_weights(far)[10:20], labels, 4)
    np.testing.assert_array_equal(some, votes[10:20])


def test_soft_vote_is_the_weighted_mean_of_what_the_head_says(monkeypatch):
    rng = np.random.default_rng(3)
    ids, weight = rng.integers(-1, 30, (30, 5)), rng.random((30, 5)).astype(np.float32)
    ids[4] = -1
    head = rng.dirichlet(np.ones(3), 30).astype(np.float32)
    for cells in (1 << 20, 40):
        monkeypatch.setattr(audit_scores, "CELLS", cells)
        found = audit_scores.soft_vote(ids, weight, lambda some: head[some], 3)
        for i in range(30):
            good = ids[i] >= 0
            want = weight[i, good] @ head[ids[i, good]] / max(weight[i, good].sum(), 1e-9)
            np.testing.assert_allclose(found[i], want if good.any() else 1 / 3, atol=1e-5)


def test_score_is_the_sum_of_both_logarithms_less_a_third_of_the_best():
    rng = np.random.default_rng(0)
    head, vote = (rng.dirichlet(np.ones(5), 30).astype(np.float32) for _ in range(2))
    labels = rng.integers(0, 5, 30)
    found = audit_scores.label_scores(head, vote, labels)
    for i, y in enumerate(labels):
        cost = [-np.log(head[i, c] + 0.001) - np.log(vote[i, c] + 0.02) for c in range(5)]
        assert found.score_N[i] == pytest.approx(cost[y] - min(cost) / 3, rel=1e-5)
        assert found.suggested_N[i] == np.argmin(cost)
        mean = (head[i] + vote[i]) / 2
        assert found.margin_N[i] == pytest.approx(np.delete(mean, y).max() - mean[y], abs=1e-6)
        first = head[i].argmax() == vote[i].argmax() != y
        assert found.agree_N[i] == (first and head[i].argmax() == np.argmin(cost))
    assert found.head_N == pytest.approx(head[np.arange(30), labels])


@pytest.mark.thorough
def test_flipped_labels_are_found_and_their_class_is_suggested():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 6, 1500)
    x = (rng.normal(size=(6, 24))[true] + 0.8 * rng.normal(size=(1500, 24))).astype(np.float32)
    flipped = rng.random(1500) < 0.2
    labels = np.where(flipped, (true + rng.integers(1, 6, 1500)) % 6, true)
    ids, far = audit_scores.neighbours(audit_scores.unit(x), 16)
    votes = audit_scores.vote(ids, audit_scores.vote_weights(far), labels, 6)
    found = audit_scores.label_scores(head_probabilities(x, labels, 6), votes, labels)
    assert roc_auc_score(flipped, found.score_N) > 0.97
    assert (found.suggested_N[flipped] == true[flipped]).mean() > 0.95
    assert found.agree_N[flipped].mean() > 0.85 > 0.05 > found.agree_N[~flipped].mean()


@pytest.mark.parametrize("dim", [3, 8])
def test_intrinsic_dimension_is_that_of_the_data_not_of_its_space(dim):
    rng = np.random.default_rng(dim)
    inside = rng.random((3000, dim)) @ np.linalg.qr(rng.normal(size=(40, dim)))[0].T
    far = np.sqrt(np.sort(((inside[:500, None] - inside) ** 2).sum(2), axis=1)[:, 1:16])
    assert audit_scores.intrinsic_dimension(far) == pytest.approx(dim, rel=0.2)
    assert audit_scores.intrinsic_dimension(np.full((4, 6), np.inf)) == 1
    assert audit_scores.intrinsic_dimension(np.zeros((4, 6))) == 1


def test_planted_near_duplicates_are_found_and_hardly_anything_else():
    z = unit_rows(3000, 16)
    rng = np.random.default_rng(1)
    copies, originals = np.arange(2900, 3000), np.arange(100)
    z[copies] = z[originals] + 0.03 * rng.normal(size=(100, 16)).astype(np.float32)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    ids, far = audit_scores.neighbours(z, 15)
    pairs = audit_scores.near_duplicates(ids, far)
    found = set(zip(pairs.a_P.tolist(), pairs.b_P.tolist(), strict=True))
    planted = set(zip(originals.tolist(), copies.tolist(), strict=True))
    assert len(found & planted) >= 98
    assert len(found - planted) <= 4
    assert (pairs.a_P < pairs.b_P).all()
    assert (np.diff(pairs.ratio_P) >= 0).all()
    np.testing.assert_allclose(pairs.cosine_P, (z[pairs.a_P] * z[pairs.b_P]).sum(1), atol=1e-5)
    first = audit_scores.proposals(ids, far, first=1, most=40)
    np.testing.assert_array_equal(first.a_P, pairs.a_P[:40])
    assert len(audit_scores.proposals(ids, far, first=3, most=10**6).a_P) > 4500
    # Between two sets: the copies are looked up among the other images.
    ids, far = audit_scores.Nearest(z[:2900])(z[2900:], 15)
    across = audit_scores.near_duplicates(ids, far, within=False, threshold=pairs.threshold)
    assert (across.b_P == across.a_P).mean() > 0.97
    assert len(across.a_P) >= 97


def test_without_near_duplicates_none_are_found():
    ids, far = audit_scores.neighbours(unit_rows(2000, 12), 15)
    assert len(audit_scores.near_duplicates(ids, far).a_P) <= 1
    ids, far = audit_scores.neighbours(np.zeros((5, 3), np.float32), 3)
    assert len(audit_scores.near_duplicates(ids, far).a_P) == 0


def test_outliers_are_far_from_their_last_neighbour():
    z = unit_rows(400, 6)
    z[:399] = z[:399] * 0.2 + z[0]
    z[399] = -z[0]
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    _, far = audit_scores.neighbours(z, 5)
    reach, rank = audit_scores.outliers(far)
    assert reach.argmax() == 399
    assert rank[399] == 1
    assert reach[7] == pytest.approx(np.sort(np.linalg.norm(z - z[7], axis=1))[5], abs=1e-5)
    assert rank[7] == pytest.approx((reach < reach[7]).sum() / 399)


def test_an_image_with_a_twin_is_no_outlier_for_having_one_neighbour_fewer():
    z = unit_rows(60, 6)
    z[30:] = z[:30]
    twin = np.arange(60) % 30
    near = np.argsort(-(z @ z.T), axis=1, kind="stable")[:, :8]
    ids, far = audit_scores.table_neighbours(z, near, 8, twin)
    assert (ids[:, -1] < 0).all()
    far[7] = np.inf  # no neighbor at all
    reach, rank = audit_scores.outliers(far)
    for row in set(range(60)) - {7}:
        others = [i for i in near[row] if twin[i] != twin[row]]
        assert reach[row] == pytest.approx(
            np.linalg.norm(z[others] - z[row], axis=1).max(), abs=1e-3
        )
    assert np.isinf(reach[7])
    assert rank[7] == 1


def test_hubs_and_bleeding_equal_loops():
    rng = np.random.default_rng(5)
    ids, far = audit_scores.neighbours(unit_rows(90, 5), 6)
    ids[4], far[4] = -1, np.inf
    labels = rng.integers(0, 4, 90)
    labels[8] = -1  # no class
    weights = audit_scores.vote_weights(far)
    degree, same = audit_scores.hubs(ids, labels)
    mass = np.zeros((4, 4))
    for i in range(90):
        for place in range(6):
            j = ids[i, place]
            if j >= 0 and labels[i] >= 0 and labels[j] >= 0:
                mass[labels[i], labels[j]] += weights[i, place]
    mass /= mass.sum(1, keepdims=True)
    for j in range(90):
        pointing = [i for i in range(90) if j in ids[i]]
        assert degree[j] == len(pointing)
        if pointing:
            assert same[j] == pytest.approx(np.mean([labels[i] == labels[j] for i in pointing]))
    found = audit_scores.bleeding(ids, weights, labels, 4)
    assert (np.diff(found.mass_P) <= 0).all()
    assert len(found.a_P) == 6
    for a, b, both, up, down in zip(*found, strict=True):
        assert a < b
        assert (up, down) == pytest.approx((mass[a, b], mass[b, a]), abs=1e-5)
        assert both == pytest.approx((up + down) / 2)
