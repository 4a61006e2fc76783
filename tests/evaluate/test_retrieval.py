"""Retrieval metrics against closed forms: identity, constants, ties, several positives, chance by simulation."""

import pytest
import torch

from mmllm.evaluate.retrieval import class_embeddings, ranks, retrieval_figures, retrieval_metrics, zero_shot_figure


def test_identity_is_perfect_and_constant_scores_nothing():
    perfect = retrieval_metrics(torch.eye(20), range(20))
    assert perfect["r1"] == 1 and perfect["median_rank"] == 1 and perfect["n"] == 20 and perfect["gallery"] == 20
    constant = retrieval_metrics(torch.zeros(20, 20), range(20))
    assert constant["r1"] == 0 and constant["r5"] == 0
    assert retrieval_metrics(torch.full((20, 20), torch.nan), range(20))["r5"] == 0


def test_rank_counts_negatives_above_the_best_positive_only():
    sim = torch.tensor([[0.9, 0.8, 0.7, 0.1], [0.1, 0.2, 0.3, 0.4]])
    assert ranks(sim, [[1, 2], [0]]).tolist() == [1, 3]
    mask = torch.tensor([[False, True, True, False], [True, False, False, False]])
    assert torch.equal(ranks(sim, mask), ranks(sim, [[1, 2], [0]]))


def test_forms_of_positives_agree_and_both_directions_are_consistent():
    sim = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    diagonal = torch.eye(8, dtype=torch.bool)
    assert (
        retrieval_metrics(sim, diagonal)
        == retrieval_metrics(sim, torch.arange(8))
        == retrieval_metrics(sim, list(range(8)))
    )
    assert retrieval_metrics(sim.T, diagonal.T)["n"] == 8
    with pytest.raises(ValueError, match="shape"):
        retrieval_metrics(sim, range(7))
    with pytest.raises(ValueError, match="without any positive"):
        ranks(sim, torch.zeros(8, 8, dtype=torch.bool))


def test_chance_matches_random_rankings():
    torch.manual_seed(0)
    mask = torch.zeros(6000, 30, dtype=torch.bool)
    mask[:, :3] = True
    got = retrieval_metrics(torch.rand(6000, 30), mask)
    assert got["chance_r1"] == pytest.approx(0.1) and got["r1"] == pytest.approx(0.1, abs=0.015)
    assert got["r5"] == pytest.approx(got["chance_r5"], abs=0.02)
    assert retrieval_metrics(torch.rand(50, 3), torch.zeros(50, dtype=torch.long))["chance_r5"] == 1


def test_figures_carry_interval_chance_and_a_control_near_chance():
    r1, r5 = retrieval_figures("retrieval_known", torch.eye(200), range(200), seed=1)
    assert (r1.name, r5.name) == ("retrieval_known_r1", "retrieval_known_r5")
    assert r1.value == 1 and r1.low == 1 and r1.control == 0 and r1.chance == pytest.approx(1 / 200) and r1.n == 200


def test_zero_shot_is_equivariant_in_the_classes_and_one_template_is_no_ensemble():
    g = torch.Generator().manual_seed(0)
    x, classes = torch.randn(40, 8, generator=g), torch.randn(5, 1, 8, generator=g)
    labels = torch.randint(0, 5, (40,), generator=g)
    emb = class_embeddings(classes)
    assert torch.allclose(emb, torch.nn.functional.normalize(classes[:, 0], dim=-1))
    perm = torch.randperm(5, generator=g)
    a = zero_shot_figure("z", x @ emb.T, labels.tolist())
    b = zero_shot_figure("z", x @ emb[perm].T, torch.argsort(perm)[labels].tolist())
    assert a.value == b.value and a.chance == b.chance
