"""Chunked ranking against brute force, closed forms of mAP, ties, and every ordered pair of modalities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmllm.contracts import Scorer
from mmllm.evaluate.ranking import chance_precision, pair_figures, positives_by_key, rank_positives
from mmllm.evaluate.retrieval import ranks, retrieval_metrics


def brute(sim, positives):
    """(negatives before the best positive, average precision) of each query, ties against the model."""
    first, precision = [], []
    for row, held in zip(sim.tolist(), positives, strict=True):
        negatives = [s for g, s in enumerate(row) if g not in held]
        hits = sorted((row[g] for g in held), reverse=True)
        above = [sum(n >= h for n in negatives) for h in hits]
        first.append(above[0])
        precision.append(np.mean([(j + 1) / (a + j + 1) for j, a in enumerate(above)]))
    return first, precision


def data(queries=23, gallery=57, seed=0, levels=None):
    g = torch.Generator().manual_seed(seed)
    q, x = torch.randn(queries, 6, generator=g), torch.randn(gallery, 6, generator=g)
    if levels:  # few distinct vectors, so that many similarities are equal
        q, x = (
            q[torch.randint(0, levels, (queries,), generator=g)],
            x[torch.randint(0, levels, (gallery,), generator=g)],
        )
    positives = [torch.randperm(gallery, generator=g)[: 1 + i % 4].tolist() for i in range(queries)]
    return q, x, positives


@pytest.mark.parametrize("levels", [None, 4])
@pytest.mark.parametrize(("chunk", "gallery_chunk"), [(1024, 16384), (5, 7), (1, 1)])
def test_chunks_agree_with_brute_force(levels, chunk, gallery_chunk):
    q, x, positives = data(levels=levels)
    sim = Scorer().score(q.double(), x.double())
    first, precision = brute(sim.float() if levels is None else sim.mul(1e4).round(), positives)
    got = rank_positives(q, x, positives, chunk=chunk, gallery_chunk=gallery_chunk)
    assert got.first.tolist() == first
    np.testing.assert_allclose(got.precision, precision, rtol=1e-6)
    assert got.positives.tolist() == [len(p) for p in positives] and got.gallery == 57


def test_agrees_with_the_ranks_of_a_similarity_matrix():
    q, x, positives = data()
    sim = Scorer().score(q, x)
    got = rank_positives(q, x, positives, chunk=4)
    assert torch.equal(got.first, ranks(sim, positives))
    mine, theirs = got.metrics((1, 5)), retrieval_metrics(sim, positives)
    assert {k: mine[k] for k in theirs if k in mine} == {k: v for k, v in theirs.items() if k in mine}
    assert {"r1", "r5", "median_rank", "chance_r1"} <= set(mine) & set(theirs)


def test_order_of_the_gallery_changes_nothing_and_a_collapsed_model_scores_nothing():
    q, x, positives = data(levels=3)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(9))
    place = torch.argsort(order)
    moved = rank_positives(q, x[order], [[int(place[g]) for g in p] for p in positives], chunk=3, gallery_chunk=11)
    plain = rank_positives(q, x, positives)
    assert torch.equal(moved.first, plain.first) and torch.equal(moved.precision, plain.precision)
    same = torch.ones(40, 7)
    flat = rank_positives(same, same, [[i] for i in range(40)], chunk=9, gallery_chunk=13)
    assert flat.metrics()["r10"] == 0 and flat.first.tolist() == [39] * 40
    broken = rank_positives(torch.full((4, 7), torch.nan), same, [[0]] * 4)
    assert broken.first.tolist() == [39] * 4


def test_mean_average_precision_in_closed_form():
    class Given(Scorer):
        def score(self, query, gallery):
            return query[:, gallery[:, 0].long()]

    # Relevant items at ranks 1, 3 and 6 of ten: (1/1 + 2/3 + 3/6) / 3.
    row = torch.arange(10, 0, -1).float()[None]
    got = rank_positives(row, torch.arange(10)[:, None], [[0, 2, 5]], Given(), gallery_chunk=4)
    assert got.precision[0].item() == pytest.approx((1 + 2 / 3 + 3 / 6) / 3)
    assert got.first.tolist() == [0]
    perfect = rank_positives(row, torch.arange(10)[:, None], [[0, 1, 2]], Given())
    assert perfect.metrics()["map"] == 1


def test_chance_precision_matches_random_orders():
    rng = np.random.default_rng(0)
    for relevant in (1, 4):
        found = []
        for _ in range(20000):
            at = np.sort(rng.permutation(12)[:relevant]) + 1
            found.append(np.mean(np.arange(1, relevant + 1) / at))
        assert chance_precision([relevant], 12) == pytest.approx(np.mean(found), abs=0.006)
    assert chance_precision([1, 4], 12) == pytest.approx((chance_precision([1], 12) + chance_precision([4], 12)) / 2)


def test_mistakes():
    q, x, positives = data()
    with pytest.raises(ValueError, match="lists of positives"):
        rank_positives(q, x, [*positives[:-1], []])
    with pytest.raises(ValueError, match="lists of positives"):
        rank_positives(q, x, positives[:-1])


def test_every_ordered_pair_with_several_captions_and_missing_modalities():
    g = torch.Generator().manual_seed(0)
    base = torch.randn(30, 16, generator=g)
    noisy = lambda t, s: t + s * torch.randn(t.shape, generator=g)  # noqa: E731
    embeddings = {
        "image": noisy(base, 0.3),
        "text": noisy(base.repeat_interleave(2, 0), 0.3),  # two captions each
        "audio": torch.randn(20, 16, generator=g),  # of the first twenty, and nothing to do with them
    }
    keys = {"image": list(range(30)), "text": [i // 2 for i in range(60)], "audio": list(range(20))}
    figures = {f.name: f for f in pair_figures("all", embeddings, keys)}
    pairs = [f"{a}_to_{b}" for a in keys for b in keys if a != b]
    assert set(figures) == {f"all_{p}_{m}" for p in pairs for m in ("r1", "r5", "r10", "map", "median_rank")}
    both = figures["all_image_to_text_r1"]
    assert both.value > 0.9 and both.n == 30 and both.control < 0.1 and both.low <= both.value <= both.high
    assert both.chance == pytest.approx(2 / 60) and "gallery of 60" in str(both.note)
    assert figures["all_text_to_image_r1"].n == 60 and figures["all_image_to_text_map"].value > 0.9
    none = figures["all_image_to_audio_r1"]
    assert none.n == 20 and none.value < 0.25 and "10 queries without a partner" in str(none.note)
    assert (
        figures["all_image_to_text_median_rank"].value == 1
        and figures["all_image_to_text_median_rank"].better == "lower"
    )
    assert positives_by_key(["a", "b"], ["b", "c", "b"]) == [[], [0, 2]]
    empty = pair_figures("x", {"a": base, "b": base}, {"a": list("ab" * 15), "b": list("cd" * 15)})
    assert [f.value for f in empty] == [None, None]
