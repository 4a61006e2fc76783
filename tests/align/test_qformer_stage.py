"""The query transformer's first stage: who sees whom, losses against plain formulas, a run, and what pretrain takes."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

from mmllm.align import load_connector
from mmllm.align.model import AlignModel
from mmllm.align.qformer_stage import QFormerStage
from mmllm.config import parse_config
from mmllm.connectors import build_connector
from mmllm.contracts import AlignBatch, Features, Stream, Tower
from mmllm.errors import UserError
from mmllm.towers.word_embeddings import WordEmbeddingTower
from mmllm.train.align import AlignConfig, align
from mmllm.train.tune_model import with_changes

END = 11


class Ready(Tower):
    """Features come ready."""

    modality, hidden_size = "vision", 6


class Words(WordEmbeddingTower):
    """Twelve words; the last ends a text."""

    def preprocessor(self):
        return type("Tokenizer", (), {"eos_token_id": END})


def connector(**options):
    torch.manual_seed(0)
    spec = {"type": "qformer", "in_dim": 6, "out_dim": 8, "num_queries": 3, "hidden_dim": 16, "num_heads": 2}
    return build_connector(spec | {"text_dim": "auto", "text_output": True} | options).eval()


def pictures(count, seed=0):
    tokens = torch.randn(count, 5, 6, generator=torch.Generator().manual_seed(seed))
    return Features(tokens, torch.ones(count, 5, dtype=torch.bool), tokens.mean(1))


def texts(ids, table):
    width = max(map(len, ids))
    padded = torch.tensor([i + [0] * (width - len(i)) for i in ids])
    mask = torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i in ids]).bool()
    tokens = table[padded]
    return Features(tokens, mask, tokens.mean(1), input_ids=padded)


def made(**options):
    """A stage on a model of a ready tower and twelve words."""
    torch.manual_seed(1)
    words = Words(12, 8)
    words.weight.data.normal_()
    towers = {"image": Ready(), "words": words}
    model = AlignModel(towers, {n: n for n in towers}, {}, {"image": connector()}, (), 8)  # type: ignore[arg-type]
    stage = QFormerStage("image", "words", **options)
    stage.setup(model)
    return stage.eval(), model


def batch_of(image, text, owner=None, count=None):
    streams = {"image": Stream(image), "words": Stream(text, owner=owner)}
    return AlignBatch(streams, ids=[str(k) for k in range(count or len(image.tokens))])


def test_who_sees_whom():
    model, table, start = connector(), torch.randn(12, 8), torch.randn(16)
    image, text = pictures(2), texts([[1, 2, 3], [4, 5]], table)
    other = texts([[1, 2, 9], [4, 9]], table)  # the last word is another
    alone, words = model.separate(image, text, start)
    causal, said, there = model.joint(image, text, "causal", start)
    both, _, _ = model.joint(image, text, "bidirectional", start)
    assert there.tolist() == [[True] * 4, [True] * 3 + [False]]
    close = torch.testing.assert_close
    close(causal, alone)  # queries see no text in either
    assert not torch.allclose(both, alone, atol=1e-3)
    close(model.out(alone), model(image)[0])
    # Text: by itself it does not change with the picture; causal, it does, and not with later words.
    close(model.separate(pictures(2, 1), text, start)[1], words)
    assert not torch.allclose(model.joint(pictures(2, 1), text, "causal", start)[1], said, atol=1e-3)
    later = model.joint(image, other, "causal", start)[1]
    close(later[0, :3], said[0, :3])
    close(later[1, :2], said[1, :2])
    assert not torch.allclose(later[0, 3], said[0, 3], atol=1e-3)
    # Padding counts for nothing.
    close(model.joint(Features(image.tokens[1:], image.mask[1:], image.pooled[1:]), texts([[4, 5]], table),
                      "bidirectional", start)[0], both[1:])  # fmt: skip
    with pytest.raises(ValueError, match="bidirectional or causal"):
        model.joint(image, text, "sideways", start)
    with pytest.raises(UserError, match="set text_output"):
        connector(text_output=False).joint(image, text, "causal", start)


def test_contrast_is_the_plain_formula_and_alike_texts_belong_together():
    stage, model = made(match=0, caption=0, label_smoothing=0.2)
    image, text = pictures(4), texts([[1, 2], [3], [1, 2], [5, 6, 7]], model.tower("words").weight)
    out = stage(batch_of(image, text))
    queries, words = model.connectors["image"].separate(image, text, stage.cls)  # type: ignore[operator]
    q, t = F.normalize(stage.query_proj(queries), dim=-1), F.normalize(stage.text_proj(words[:, 0]), dim=-1)
    z = torch.stack([(q[:, k] @ t.T) for k in range(3)]).amax(0) / 0.07
    target = torch.eye(4)
    target[0, 2] = target[2, 0] = 1
    target = 0.8 * target / target.sum(1, keepdim=True) + 0.2 / 4
    plain = 0.5 * (F.cross_entropy(z, target) + F.cross_entropy(z.T, target))
    torch.testing.assert_close(out["loss"], plain)
    torch.testing.assert_close(out["contrast"], plain)


def test_caption_is_the_mean_over_tokens_and_ends():
    stage, model = made(match=0, contrast=0)
    ids = [[1, 2, 3], [4]]
    image, text = pictures(2), texts(ids, model.tower("words").weight)
    states = stage.to_words(model.connectors["image"].joint(image, text, "causal", stage.dec)[1])  # type: ignore[operator]
    logits = states @ model.tower("words").weight.T
    each = [F.cross_entropy(logits[i, : len(row) + 1], torch.tensor([*row, END]), reduction="sum")
            for i, row in enumerate(ids)]  # fmt: skip
    torch.testing.assert_close(stage(batch_of(image, text))["loss"], sum(each) / 6)


def test_match_draws_wrong_pairs_that_are_wrong():
    stage, model = made(contrast=0, caption=0)
    table = model.tower("words").weight
    out = stage(batch_of(pictures(4), texts([[1], [2], [1], [3]], table)))
    assert set(out) == {"loss", "contrast", "match", "match_accuracy"}
    torch.testing.assert_close(out["loss"], out["match"])
    # All texts alike: there is no wrong pair, and a classifier that says "right" is right.
    with torch.no_grad():
        stage.matcher.bias.copy_(torch.tensor([-50.0, 50.0]))
        stage.matcher.weight.zero_()
    out = stage(batch_of(pictures(3), texts([[1]] * 3, table)))
    assert out["match_accuracy"] == 1 and out["match"] < 1e-6
    # With wrong pairs that are drawn: one of three is right.
    out = stage(batch_of(pictures(3), texts([[1], [2], [3]], table)))
    assert math.isclose(float(out["match_accuracy"]), 1 / 3, rel_tol=1e-5)


def test_texts_find_their_picture_by_their_owner():
    stage, model = made(match=0)
    table = model.tower("words").weight
    image = pictures(3)
    some = texts([[1], [2], [3]], table)
    lacking = Stream(Features(image.tokens[:2], image.mask[:2], image.pooled[:2]), owner=torch.tensor([0, 2]))
    batch = AlignBatch({"image": lacking, "words": Stream(some, owner=torch.tensor([0, 1, 2]))}, ids=["a", "b", "c"])
    whole = batch_of(lacking.features, texts([[1], [3]], table))
    torch.testing.assert_close(stage(batch)["loss"], stage(whole)["loss"])
    unseen = Stream(texts([[1]], table), owner=torch.tensor([1]))
    none = AlignBatch({"image": lacking, "words": unseen}, ids=["a", "b", "c"])
    assert stage(none)["loss"] == 0 and stage(none)["loss"].requires_grad


def test_a_connector_that_cannot_is_refused():
    for wrong in (connector(text_output=False), build_connector({"type": "mlp", "in_dim": 6, "out_dim": 8})):
        stage, model = made()
        model.connectors["image"] = wrong
        with pytest.raises(UserError, match="one that reads texts"):
            stage.setup(model)
    stage, model = made()
    model.connectors["image"] = connector(text_dim=5)
    with pytest.raises(UserError, match="not those that the connector reads"):
        stage.setup(model)
    with pytest.raises(UserError, match="one above"):
        QFormerStage("image", "words", 0, 0, 0)


def test_a_run_learns_and_pretrain_takes_the_queries_without_the_text(settings, world, tmp_path, monkeypatch):
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path / "cache"))
    image = settings["streams"]["image"] | {
        "connector": {"type": "qformer", "num_queries": 4, "hidden_dim": 64, "text_dim": "auto", "text_output": True}
    }
    own = {
        **{k: v for k, v in settings.items() if k not in ("phases", "measures", "streams")},
        "streams": {"image": image, "words": settings["streams"]["words"]},
        "phases": {
            "queries": {
                "sources": {
                    "things": {"data": "things_train.jsonl", "streams": ["image", "words"], "augment": "none"}
                },
                "objectives": [{"type": "qformer", "options": {"stream": "image", "text": "words"}}],
                "trains": ["image.connector"],
                "train": {"max_steps": 400, "per_device_train_batch_size": 16, "learning_rate": 3e-3},
            }
        },
    }  # fmt: skip
    out = align(parse_config(own, AlignConfig), tmp_path / "run")
    last = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        last |= json.loads(line)
    assert last["contrast"] < 1.8 and last["caption"] < 0.5 and last["match"] < 0.6, last  # from 2.8, 2.5 and 0.65
    kept, about = load_connector(out, "vision")
    plain = with_changes(kept, {"text_dim": None, "text_output": False}).eval()
    assert kept.takes_text and not plain.takes_text and about["stream"] == "image"
    seen = Features(torch.randn(2, 5, kept.in_dim), torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, kept.in_dim))
    torch.testing.assert_close(plain(seen)[0], kept.eval()(seen)[0])
    assert not any(part in name for name in plain.state_dict() for part in kept.text_parts)
