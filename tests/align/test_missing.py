"""Items that lack a modality or have several captions: losses, sources and a whole run."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from mmllm.align.objectives import InfoNCE, SigLIP
from mmllm.config import parse_config
from mmllm.contracts import AlignBatch, Stream
from mmllm.train.align import AlignConfig, AlignStage, align


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path_factory.mktemp("cache")))


def rows(n, seed):
    made = torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))
    return F.normalize(made, dim=-1).requires_grad_()


def batch_of(a, b, own, theirs, size, labels=None):
    owner = [None if o is None else torch.tensor(o, dtype=torch.long) for o in (own, theirs)]
    streams = {"image": Stream(embedding=a, owner=owner[0]), "text": Stream(embedding=b, owner=owner[1])}
    scale, bias = torch.tensor(5.0, requires_grad=True), torch.tensor(-2.0, requires_grad=True)
    ids = [str(i) for i in range(size)]
    return AlignBatch(streams, ids, labels, logit_scale={"image:text": scale}, logit_bias={"image:text": bias})


def mean_loss(objective, batch):
    out = objective(batch)
    loss, valid = out["loss"], out.get("valid", torch.ones(len(out["loss"]), dtype=torch.bool))
    assert not loss[~valid].any()
    return loss.sum() / valid.sum().clamp(min=1), valid


@pytest.mark.parametrize("labels", [None, ["x", "y", "x", "y", "z", "x"]], ids=["no labels", "labels"])
@pytest.mark.parametrize("cls", [InfoNCE, SigLIP])
def test_items_without_the_pair_take_no_part(cls, labels):
    own, theirs = [0, 1, 3, 5], [5, 0, 2, 3, 4]  # items 0, 3 and 5 have both
    a, b = rows(4, 0), rows(5, 1)
    loss, valid = mean_loss(cls(["image", "text"]), batch_of(a, b, own, theirs, 6, labels))
    loss.backward()
    assert valid.tolist() == [True, False, False, True, False, True]
    held = [labels[i] for i in (0, 3, 5)] if labels else None
    c, d = (x.detach()[k].requires_grad_() for x, k in ((a, [0, 2, 3]), (b, [1, 3, 0])))
    expected, _ = mean_loss(cls(["image", "text"]), batch_of(c, d, None, None, 3, held))
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(a.grad[[0, 2, 3]], c.grad)
    torch.testing.assert_close(b.grad[[1, 3, 0]], d.grad)
    assert not a.grad[1].any() and not b.grad[[2, 4]].any()


@pytest.mark.parametrize("cls", [InfoNCE, SigLIP])
def test_several_captions_of_an_item_equal_the_written_out_loss(cls):
    theirs = [0, 0, 1, 2, 2, 2]
    a, b = rows(3, 2), rows(6, 3)
    got = cls(["image", "text"])(batch_of(a, b, None, theirs, 3))["loss"]
    score, positive = 5.0 * a @ b.T, torch.arange(3)[:, None] == torch.tensor(theirs)[None]
    if cls is InfoNCE:
        forth = torch.stack([-r.log_softmax(0)[p].mean() for r, p in zip(score, positive)])
        back = F.cross_entropy(score.T, torch.tensor(theirs), reduction="none")
    else:
        each = -F.logsigmoid((score - 2.0) * torch.where(positive, 1.0, -1.0))
        forth, back = each.sum(1), each.sum(0)
    expected = [0.5 * (forth[i] + back[positive[i]].mean()) for i in range(3)]
    torch.testing.assert_close(got, torch.stack(expected))


@pytest.mark.parametrize("cls", [InfoNCE, SigLIP])
@pytest.mark.parametrize("own, theirs", [([0, 1], [2, 3]), ([0, 1], []), ([], None)])
def test_nobody_has_the_pair(cls, own, theirs):
    a, b = rows(len(own), 4), rows(4 if theirs is None else len(theirs), 5)
    batch = batch_of(a, b, own, theirs, 4)
    out = cls(["image", "text"])(batch)
    assert out["loss"].tolist() == [0.0] * 4 and out["valid"].tolist() == [False] * 4
    out["loss"].sum().backward()
    assert float(batch.logit_scale["image:text"].grad) == 0


@pytest.fixture
def lacking(settings, world, tmp_path):
    """Settings whose things lack a picture (0, 1), or two of the three streams' fields (0)."""
    held = [json.loads(line) for line in (world / "things_train.jsonl").read_text().splitlines()]
    for row in held:
        row["image"] = row["audio"] = str(world / row["image"])
        row["audio"] = row["audio"].replace(".png", ".wav")
    del held[0]["image"], held[0]["audio"], held[1]["image"]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in held))
    settings["data"] = {"max_rejected": 0.1}
    settings["phases"]["both"]["sources"]["things"] |= {
        "data": str(tmp_path / "t.jsonl"),
        "streams": ["image", "audio", "text"],
        "optional": ["image"],
        "sampler": "shuffle",
        "batch_size": 31,
        "augment": "none",
    }
    return settings


@pytest.mark.parametrize("trains", [set(), {"image", "audio"}], ids=["frozen", "training"])
def test_a_source_with_an_optional_stream(lacking, trains):
    spec = lacking["phases"]["both"]["sources"]["things"]
    spec["optional"] = ["image", "audio"]
    stage = AlignStage(parse_config(lacking, AlignConfig))
    config = stage.config.phases["both"].sources["things"]
    want = {s: {"embedding"} for s in config.streams}
    source = stage._source("things", config, want, trains, 0, 8, True)
    (row,) = stage.rejected.rows
    assert row["where"].endswith("t.jsonl:1") and row["why"] == "has only text of audio, image, text"
    batch = source.batch(0)
    place = batch["ids"].index("train-0-1")
    assert len(batch["ids"]) == 31 and set(batch["owners"]) == {"image", "audio", "text"} and batch["ragged"]
    assert batch["owners"]["image"].tolist() == [p for p in range(31) if p != place]
    name = "pixel_values" if trains else "pooled"
    whole = stage._source("things", config, want, trains, 0, 8, True).collate(batch["items"].tolist(), None)
    assert len(batch["streams"]["image"][name]) == 30
    assert len(batch["streams"]["audio"]["input_features" if trains else "pooled"]) == 31
    # Each row is the picture of its owner.
    alone = [source.collate([int(batch["items"][p])], None)["streams"]["image"][name][0] for p in (30, 0)]
    kept = batch["owners"]["image"].tolist()
    for p, one in zip((30, 0), alone):
        if p in kept:
            torch.testing.assert_close(whole["streams"]["image"][name][kept.index(p)], one, atol=1e-5, rtol=1e-4)
    lone = source.collate([int(batch["items"][place])], None)
    assert lone["streams"]["image"] == {} and lone["owners"]["image"].tolist() == []


def test_a_stream_that_is_not_optional_is_needed(lacking):
    lacking["phases"]["both"]["sources"]["things"]["batch_size"] = 8
    stage = AlignStage(parse_config(lacking, AlignConfig))
    config = stage.config.phases["both"].sources["things"]
    stage._source("things", config, {s: {"embedding"} for s in config.streams}, set(), 0, 8, True)
    assert [r["why"] for r in stage.rejected.rows] == ["no audio, which is needed"]


def test_a_run_over_three_streams_with_missing_media(settings, tmp_path):
    pairs = [["image", "text"], ["audio", "text"], ["image", "audio"]]
    settings["measures"], settings["words"] = {}, None
    settings["phases"] = {
        "all": {
            "sources": {
                "all": {
                    "data": ["things_train.jsonl", "sounds_train.jsonl"],
                    "recipes": [{"type": "join_by_label", "field": "image", "add": ["audio"], "keep": True}],
                    "streams": ["image", "audio", "text"],
                    "optional": ["image", "audio"],
                    "sampler": "shuffle",
                    "augment": ["cutout", "sound"],
                }
            },
            "objectives": [{"type": "infonce", "options": {"pair": p}} for p in pairs],
            "trains": ["image.tower", "image.head", "audio.tower", "audio.head", "text.head"],
            "train": {"max_steps": 24, "logging_steps": 8},
        }
    }
    out = align(parse_config(settings, AlignConfig), tmp_path / "run")
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(logged) == 3 and all(0 < r["loss"] < 20 for r in logged)
    assert all(r[f"infonce:{':'.join(p)}"] > 0 for r in logged for p in pairs)
    assert logged[-1]["loss"] < logged[0]["loss"]
