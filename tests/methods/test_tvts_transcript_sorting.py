"""Oracles of transcript sorting: the catalogue's entry 53."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from mmllm.align.objectives import InfoNCE
from mmllm.contracts import AlignBatch, Features, Stream
from mmllm.methods.tvts_transcript_sorting import TVTS, Sorter, by_item
from mmllm.report.figures import read_figures
from tests.align.conftest import settings, world  # noqa: F401
from tests.methods.short_run import short_run

PAIR = ["video", "text"]
OWNER = torch.tensor([0, 0, 0, 1, 1, 1, 2])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(texts=None):
    texts = random(7, 6, seed=1) if texts is None else texts
    video = Stream(token_embedding=random(3, 4, 8), token_mask=torch.ones(3, 4, dtype=torch.bool))
    text = Stream(Features(texts[:, None], torch.ones(7, 1).bool(), texts), F.normalize(random(7, 8, seed=2), dim=-1))
    text.owner = OWNER
    return AlignBatch({"video": video, "text": text}, ids=list("abc"), logit_scale={"video:text": torch.tensor(10.0)})


def objective(**options):
    torch.manual_seed(0)
    made = TVTS(PAIR, texts=3, **options)
    made.setup(SimpleNamespace(
        connectors={"video": SimpleNamespace(out_dim=8)}, owner=lambda *_: "video",
        tower=lambda _: SimpleNamespace(pooled_size=6),
    ))  # fmt: skip
    return made


def test_the_order_of_the_texts_turns_the_logits_alike():
    torch.manual_seed(0)
    sorter = Sorter(8, 6, 4).eval()
    tokens, texts, there = random(2, 5, 8), random(2, 4, 6, seed=1), torch.ones(2, 4, dtype=torch.bool)
    mask = torch.ones(2, 5, dtype=torch.bool)
    turn = [2, 0, 3, 1]
    logits = sorter(tokens, mask, texts, there)
    torch.testing.assert_close(sorter(tokens, mask, texts[:, turn], there), logits[:, turn])
    there[:, 3] = False
    longer = torch.cat([texts[:, :3], random(2, 1, 6, seed=5)], 1)
    shorter = sorter(tokens, mask, texts[:, :3], there[:, :3])
    torch.testing.assert_close(sorter(tokens, mask, longer, there)[:, :3], shorter)


def test_the_gradient_reaches_the_sequence_alone():
    texts = random(7, 6, seed=1).requires_grad_()
    one = batch(texts)
    video = one.streams["video"]
    assert video.token_embedding is not None
    video.token_embedding.requires_grad_()
    plain = objective(sort=0)(one)["loss"].sum()
    whole = objective()(one)["loss"].sum()
    (grad,) = torch.autograd.grad(whole - plain, [video.token_embedding], retain_graph=True)
    assert grad[:2].abs().sum() > 0
    assert torch.autograd.grad(whole, [texts], allow_unused=True)[0] is None


def test_a_uniform_sorter_has_log_k():
    one = objective()
    torch.nn.init.zeros_(one.sorter.classifier.weight)
    torch.nn.init.zeros_(one.sorter.classifier.bias)
    out, plain = one(batch()), objective(sort=0)(batch())["loss"]
    torch.testing.assert_close(out["sort"], torch.tensor(math.log(3)))
    expected = plain + torch.tensor([2 * math.log(3)] * 2 + [0.0])  # the last item has one text
    torch.testing.assert_close(out["loss"], expected)


def test_the_contrast_is_with_the_mean_of_the_texts():
    one = batch()
    video, text = one.streams["video"], one.streams["text"]
    assert video.token_embedding is not None and text.embedding is not None
    means = torch.stack([text.embedding[OWNER == i].mean(0) for i in range(3)])
    rows = {"video": F.normalize(video.token_embedding.mean(1), dim=-1), "text": F.normalize(means, dim=-1)}
    plain = AlignBatch({k: Stream(embedding=v) for k, v in rows.items()}, ids=list("abc"), logit_scale=one.logit_scale)
    torch.testing.assert_close(objective(sort=0)(one)["loss"], InfoNCE(PAIR)(plain)["loss"])


def test_texts_by_item_keep_their_order():
    pooled = torch.arange(6.0)[:, None]
    owner = torch.tensor([1, 0, 1, 3, 1, 1])
    stream = Stream(Features(pooled[:, None], torch.ones(6, 1), pooled), owner=owner)
    texts, there = by_item(stream, 4, 3)
    assert texts[..., 0].tolist() == [[1, 0, 0], [0, 2, 4], [0, 0, 0], [3, 0, 0]]
    assert there.sum(1).tolist() == [1, 3, 0, 1]


def test_the_card_switches_it_on(settings, tmp_path):  # noqa: F811
    settings["streams"]["video"] = {
        "modality": "video",
        "tower": settings["streams"]["image"]["tower"],
        "connector": {"type": "sequence", "frames": 3, "hidden_dim": 16},
    }
    recipes = [{"type": "sequence", "length": 3, "count": 24}]
    source = {"streams": ["video", "text"], "recipes": recipes, "captions": "all", "frames": 3, "augment": "none"}
    about = {"data": "things_val.jsonl", "train": "things_train.jsonl", "recipes": recipes, "frames": 3}
    measures = {"first": {"kind": "what_came_first", "streams": ["video"], **about}}
    line = [{"type": "tvts", "options": {"pair": PAIR, "texts": 3}}]
    rows = short_run(settings, tmp_path / "run", line, ["video.connector", "text.head"], measures, **source)
    assert [0 < r["sort"] < 3 for r in rows if "loss" in r] == [True] * 3
    names = [f.name for f in read_figures(tmp_path / "run" / "final" / "results.json")]
    assert names == ["first_knn", "first_linear"]
