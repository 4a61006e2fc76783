"""Prompted classes: the ensemble's closed form, classification, and what a class list may not hold."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmllm.contracts import Scorer
from mmllm.errors import UserError
from mmllm.evaluate.zero_shot import class_prompts, classify, embed_classes


def embed(texts):
    """A fixed vector for each text, of any length."""
    rows = [torch.randn(6, generator=torch.Generator().manual_seed(sum(map(ord, t)))) * (1 + len(t)) for t in texts]
    return torch.stack(rows)


def test_a_class_is_the_unit_mean_of_its_unit_prompts():
    templates = ["a {}", "the {} here", "{}"]
    got = embed_classes(embed, ["cat", "dog"], templates)
    for row, name in zip(got, ("cat", "dog"), strict=True):
        unit = [F.normalize(embed([t.format(name)])[0], dim=0) for t in templates]
        torch.testing.assert_close(row, F.normalize(sum(unit) / 3, dim=0))
    single = embed_classes(embed, ["cat", "dog"], ["{}"])
    torch.testing.assert_close(single, F.normalize(embed(["cat", "dog"]), dim=-1))


def test_classification_takes_the_nearest_class_under_any_scorer():
    classes = torch.eye(3)
    query = torch.tensor([[0.1, 0.9, 0.0], [5.0, 1.0, 4.0]])
    assert classify(query, classes)[1].tolist() == [1, 0]

    class Opposite(Scorer):
        def score(self, query, gallery):
            return -super().score(query, gallery)

    scores, found = classify(query, classes, Opposite())
    assert found.tolist() == [2, 1] and scores.shape == (2, 3)


@pytest.mark.parametrize(
    ("classes", "templates", "words"),
    [
        (["cat", "dog", "cat "], ["{}"], "duplicates: cat"),
        (["cat"], ["{}"], "at least two"),
        (["cat", "dog"], ["a photo"], "no place for the class"),
        (["cat", "dog"], [], "no templates"),
    ],
)
def test_mistakes_in_one_line(classes, templates, words):
    with pytest.raises(UserError, match=words) as caught:
        class_prompts(classes, templates)
    assert "\n" not in str(caught.value)
