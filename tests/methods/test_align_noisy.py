"""ALIGN's oracles: the catalogue's entry 16."""

from __future__ import annotations

import random

import pytest
import torch
from PIL import Image

from mmllm.align.objectives import InfoNCE
from mmllm.config import parse_config
from mmllm.errors import UserError
from mmllm.methods.align_noisy import FrequencyFilters
from mmllm.train.align import align
from mmllm.train.align_config import AlignConfig
from tests.align.conftest import settings, world  # noqa: F401

PAIR = ["image", "text"]


def test_smoothing_mixes_in_the_mean_over_the_batch(make_batch, unit):
    a, b = unit(6, 8), unit(6, 8, seed=1)
    batch = make_batch({"image": a, "text": b})
    logits = 10 * a @ b.T
    even = -0.5 * (logits.log_softmax(1).mean(1) + logits.T.log_softmax(1).mean(1))
    plain = InfoNCE(PAIR)(batch)["loss"]
    torch.testing.assert_close(InfoNCE(PAIR, label_smoothing=0.1)(batch)["loss"], 0.9 * plain + 0.1 * even)
    torch.testing.assert_close(InfoNCE(PAIR, label_smoothing=0.0)(batch)["loss"], plain)


def test_a_positive_that_is_too_likely_is_held_back():
    from mmllm.blocks.tiled_contrast import contrast

    for top, sign in ((20.0, 1), (1.0, -1)):
        rows = torch.eye(5).mul(top).requires_grad_()
        contrast(rows, torch.eye(5), label_smoothing=0.1).sum().backward()
        slope, p = rows.grad, rows.detach().softmax(1)
        torch.testing.assert_close(slope.sum(1), torch.zeros(5), atol=1e-6, rtol=0)
        assert ((p.diagonal() > 0.9 + 0.1 / 5) == (sign > 0)).all()
        assert (slope.diagonal().sign() == sign).all()


def record(number, text, width=300, height=300):
    texts, size = text if isinstance(text, list) else [text], {"width": width, "height": height}
    return {"id": f"r{number}", "image": f"{number}.png", "text": texts, "meta": size}


GOOD = [record(k, f"a very good picture {'of' if k % 2 else 'with'} dogs") for k in range(4)]
TABLE = [
    (record(10, "a good dogs picture", 201, 300), None),
    (record(11, "a good dogs picture", 200, 300), "min_side"),
    (record(12, "a good dogs picture", 900, 301), None),
    (record(13, "a good dogs picture", 903, 301), "max_aspect"),
    (record(14, "good dogs"), "words"),
    (record(15, "a good picture of dogs with a very"), "words"),
    (record(16, "a good xylophone picture"), "vocabulary"),
    (record(17, [f"{w} good picture" for w in ("a", "of", "with", "very")]), "max_texts_per_image"),
    (record(18, "a test picture"), "held_out"),
] + [(record(20 + k, "a shared good picture"), "max_images_per_text") for k in range(7)]


def filters():
    return FrequencyFilters(
        max_texts_per_image=3, max_images_per_text=6, min_words=3, max_words=7, vocabulary=20, held_out=["r18"]
    )


def test_truth_table_of_the_rules():
    recipe = filters()
    records = GOOD + [r for r, _ in TABLE]
    kept = {r["id"] for r in recipe.apply(iter(records))}
    expected = {r["id"] for r in GOOD} | {r["id"] for r, rule in TABLE if rule is None}
    assert kept == expected
    counts = {rule: sum(x == rule for _, x in TABLE) for _, rule in TABLE if rule}
    assert recipe.removed == counts
    for seed in range(3):
        turned = random.Random(seed).sample(records, len(records))
        other = filters()
        assert {r["id"] for r in other.apply(iter(turned))} == expected and other.removed == counts


def test_a_bad_text_goes_alone_and_sizes_are_read(tmp_path):
    Image.new("RGB", (300, 100)).save(tmp_path / "wide.png")
    Image.new("RGB", (299, 100)).save(tmp_path / "fits.png")
    texts = ["one two three", "short"]
    rows = [{"id": n, "image": str(tmp_path / f"{n}.png"), "text": texts} for n in ("wide", "fits")]
    recipe = FrequencyFilters(min_side=50)
    assert [(r["id"], r["text"]) for r in recipe.apply(iter(rows))] == [("fits", ["one two three"])]
    assert recipe.removed == {"max_aspect": 1, "words": 1}
    assert len(list(FrequencyFilters(min_side=50, sizes=False).apply(iter(rows)))) == 2


def test_mistakes_are_named():
    with pytest.raises(UserError, match="min_words 5 is above"):
        FrequencyFilters(min_words=5, max_words=2)


def test_a_run_with_both(settings, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path / "cache"))
    rules = {"type": "frequency_filters", "min_side": 16, "max_images_per_text": 3, "min_words": 2}
    both = settings["phases"]["both"]
    both["sources"] = {"things": both["sources"]["things"] | {"recipes": [rules]}}
    both["objectives"] = [{"type": "infonce", "options": {"pair": PAIR, "label_smoothing": 0.1}}]
    both |= {"trains": ["image.head", "text.head"], "train": {"max_steps": 2, "logging_steps": 1}}
    settings["phases"], settings["measures"] = {"both": both}, {}
    with pytest.raises(UserError, match="no records"):
        align(parse_config(settings, AlignConfig), tmp_path / "none")
    rules["max_images_per_text"] = 4
    align(parse_config(settings, AlignConfig), tmp_path / "run")
    assert "removed max_images_per_text 64" in capsys.readouterr().out
