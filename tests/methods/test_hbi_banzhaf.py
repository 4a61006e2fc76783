"""Oracles of Banzhaf interactions of tokens: the catalogue's entry 47."""

from __future__ import annotations

import itertools

import pytest
import torch

from mmllm.align.objectives import InfoNCE
from mmllm.connectors import build_connector
from mmllm.contracts import Features
from mmllm.errors import UserError
from mmllm.methods.hbi_banzhaf import HBI, Merge, WeightedInteraction, banzhaf, follow, interaction, value
from tests.align.conftest import settings, world  # noqa: F401
from tests.methods.short_run import short_run

PAIR = ["image", "text"]


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_sum_over_pairs_is_its_own_interaction():
    a = random(3, 4) - 0.5
    game = lambda r, c: torch.einsum("kt,kv,tv->k", r.double(), c.double(), a)  # noqa: E731
    torch.testing.assert_close(interaction(game, 3, 4), a)


def test_equal_cosines_have_the_closed_form():
    for t, v in ((1, 1), (2, 3), (4, 3)):
        s = torch.full((1, t, v), 0.7, dtype=torch.float64)
        found = banzhaf(s, torch.ones(1, t), torch.ones(1, v))
        torch.testing.assert_close(found, torch.full_like(s, 0.7 * 2.0 ** (2 - t - v)))


def test_equals_the_definition_summed_over_subsets():
    s, a, b = random(1, 2, 3), random(1, 2, seed=1) + 0.1, random(1, 3, seed=2) + 0.1
    players = range(5)

    def v(group):
        rows, cols = [i for i in group if i < 2], [i - 2 for i in group if i >= 2]
        if not rows or not cols:
            return 0.0
        x, y, part = a[0, rows], b[0, cols], s[0][rows][:, cols]
        return float((part.amax(1) * x).sum() / x.sum() + (part.amax(0) * y).sum() / y.sum()) / 2

    found = banzhaf(s, a, b)[0]
    for i, j in itertools.product(range(2), range(2, 5)):
        rest = [p for p in players if p not in (i, j)]
        groups = [g for k in range(4) for g in itertools.combinations(rest, k)]
        total = sum(v((*g, i, j)) - v((*g, i)) - v((*g, j)) + v(g) for g in groups)
        assert abs(total / 8 - float(found[i, j - 2])) < 1e-9


def test_order_and_padding():
    s, a, b = random(2, 3, 3), random(2, 3, seed=1) + 0.1, random(2, 3, seed=2) + 0.1
    found = banzhaf(s, a, b)
    turned = banzhaf(s[:, [2, 0, 1]], a[:, [2, 0, 1]], b)
    torch.testing.assert_close(turned, found[:, [2, 0, 1]])
    wider = torch.cat([s, torch.full((2, 3, 1), 0.99, dtype=torch.float64)], 2)
    padded = banzhaf(wider, a, torch.cat([b, torch.zeros(2, 1)], 1))
    torch.testing.assert_close(padded[..., :3], found)
    torch.testing.assert_close(padded[..., 3], torch.zeros(2, 3, dtype=torch.float64))


def test_drawn_coalitions_come_near_all_of_them():
    s, a, b = random(1, 3, 3), torch.ones(1, 3), torch.ones(1, 3)
    drawn = banzhaf(s, a, b, exact=2, samples=100_000, generator=torch.Generator().manual_seed(0))
    assert (drawn - banzhaf(s, a, b)).abs().max() < 0.02


def test_interactions_find_true_pairs_among_hubs():
    generator, true = torch.Generator().manual_seed(0), torch.eye(5, dtype=torch.bool).expand(40, 5, 5)
    s = 0.15 * torch.randn(40, 5, 5, generator=generator) + 0.35 * true
    s[:, 0] += 0.4  # a word and a frame that are like everything
    s[:, :, 1] += 0.4

    def auc(x):
        yes, no = x[true].view(40, -1, 1), x[~true].view(40, 1, -1)
        return float((yes > no).float().mean())

    assert auc(banzhaf(s, torch.ones(40, 5), torch.ones(40, 5))) > auc(s) + 0.08


def test_the_score_of_all_tokens(unit):
    x, y = unit(2, 3, 8), unit(3, 4, 8, seed=1)
    a, b = torch.rand(2, 3) + 0.1, torch.rand(3, 4) + 0.1
    b[1, 2:] = 0
    score = WeightedInteraction().score((x, a), (y, b))
    s = x[0] @ y[1, :2].T
    expected = (s.amax(1) * a[0]).sum() / a[0].sum() + (s.amax(0) * b[1, :2]).sum() / b[1].sum()
    torch.testing.assert_close(score[0, 1], expected / 2)
    torch.testing.assert_close(WeightedInteraction().score((y, b), (x, a)), score.T)
    assert float(value(x[0] @ y[0].T, a[0], torch.zeros(4))) == 0


def test_tokens_carry_their_weight_as_length():
    torch.manual_seed(0)
    made = build_connector({"type": "weighted_tokens", "in_dim": 6, "out_dim": 4, "tokens": 2}).eval()
    valid = torch.arange(5) < torch.tensor([[5], [2], [0]])
    tokens, mask = made(Features(torch.randn(3, 5, 6), valid, torch.randn(3, 6)))
    assert tokens.shape == (3, 2, 4) and mask.tolist() == [[True] * 2, [True] * 2, [False] * 2]
    inner = made.inner(Features(torch.zeros(1, 2, 6), torch.ones(1, 2).bool(), torch.zeros(1, 6)))[0]
    same = made(Features(torch.zeros(1, 2, 6), torch.ones(1, 2).bool(), torch.zeros(1, 6)))[0]
    torch.testing.assert_close(same.norm(dim=-1), made.score(inner).exp()[..., 0])
    assert (tokens[2] == 0).all()


def test_clusters_of_what_lies_together(unit):
    torch.manual_seed(0)
    centres = torch.eye(8)[:2]
    x = torch.stack([centres[0], centres[1], centres[0], centres[1], centres[0], centres[1]])[None]
    x = torch.nn.functional.normalize(x + 0.01 * torch.randn(1, 6, 8), dim=-1)
    merge = Merge(8, 1 / 3)
    member = merge.clusters(x, torch.ones(1, 6, dtype=torch.bool))[0]
    assert sorted(map(tuple, member.int().tolist())) == [(0, 1, 0, 1, 0, 1), (1, 0, 1, 0, 1, 0)]
    weight = torch.rand(3, 6) + 0.1
    weight[1, 2:] = 0
    tokens, total = merge((unit(3, 6, 8), weight))
    assert tokens.shape == (3, 2, 8) and (total[1] > 0).tolist() == [True, False]
    torch.testing.assert_close(total.sum(1), weight.sum(1))
    torch.testing.assert_close(tokens.norm(dim=-1), torch.ones(3, 2))


def test_one_level_without_interaction_is_infonce_on_the_score(make_batch, unit):
    rows = {"image": (2 * unit(4, 3, 8), None), "text": (unit(4, 2, 8, seed=1), None)}
    batch = make_batch(rows, label_ids=torch.arange(4))
    plain = HBI(PAIR, ratios=[], interaction=0)(batch)["loss"]
    torch.testing.assert_close(plain, InfoNCE(PAIR, scorer="weighted_interaction")(batch)["loss"])
    torch.manual_seed(0)
    whole = HBI(PAIR)
    whole.setup(type("Model", (), {"embedding_dim": 8}))
    out = whole(batch)
    assert (out["loss"] > plain).all() and out["banzhaf_kl"] > 0
    out["loss"].sum().backward()
    assert all(p.grad is not None for p in whole.headers.parameters())
    x = torch.randn(3, 4)
    torch.testing.assert_close(follow(x, x), torch.zeros(3))
    with pytest.raises(UserError, match="ratios"):
        HBI(PAIR, ratios=[2])


def test_the_card_switches_it_on(settings, tmp_path):  # noqa: F811
    for name in PAIR:
        settings["streams"][name]["connector"] = {"type": "weighted_tokens", "tokens": 3}
    line = [{"type": "hbi", "options": {"pair": PAIR}}]
    about = {"data": "things_val.jsonl", "streams": PAIR, "scorer": "weighted_interaction", "by": "label"}
    rows = short_run(
        settings, tmp_path / "run", line, ["image.connector", "text.connector"], {"found": {"kind": "pairs", **about}}
    )
    assert [r["hbi:image:text"] > 0 and r["banzhaf_kl"] > 0 for r in rows if "loss" in r] == [True] * 3
