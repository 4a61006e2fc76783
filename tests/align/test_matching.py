"""Things and tokens on no grid: the best assignment, and objectives that go by it."""

from __future__ import annotations

import itertools

import torch

from mmllm.align.matching import assigned_things
from mmllm.align.objectives import RegionAlign
from mmllm.align.region_box import RegionBox, token_boxes
from mmllm.align.region_side import RegionSide
from mmllm.blocks.box_code import waves
from mmllm.config import parse_config
from mmllm.contracts import AlignBatch, Stream
from mmllm.report.figures import read_figures
from mmllm.train.align import AlignConfig, align

NAMES = {"cat": 0, "dog": 1, "fox": 2, "owl": 3}


def things(*names):
    return [{"xyxy": [0.1 * k, 0.2, 0.1 * k + 0.3, 0.6], "text": name} for k, name in enumerate(names)]


def batch_of(tokens, boxes, words, mask=None):
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask
    extras = {"vocabulary": {"embedding": words, "index": NAMES}}
    ids = [str(k) for k in range(len(tokens))]
    return AlignBatch({"image": Stream(token_embedding=tokens, token_mask=mask)}, ids, boxes=boxes, extras=extras)


def test_the_assignment_is_the_best_of_all():
    torch.manual_seed(0)
    words, tokens = torch.randn(4, 8), torch.randn(3, 5, 8)
    boxes = [things("cat", "owl", "cat"), [], things("fox")]
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, 1] = False
    with torch.autocast("cpu", torch.bfloat16):  # as in training, where products come in half precision
        assert (assigned_things(tokens, mask, words, NAMES, boxes) >= 0).sum() == 4
    owner = assigned_things(tokens, mask, words, NAMES, boxes)
    centre = words.mean(0)
    near = torch.nn.functional.cosine_similarity((tokens - centre)[:, :, None], (words - centre)[None, None], dim=-1)
    for row, held in enumerate(boxes):
        free = [m for m in range(5) if mask[row, m]]
        best = max(
            itertools.permutations(free, len(held)),
            key=lambda p: sum(float(near[row, m, NAMES[t["text"]]]) for m, t in zip(p, held)),  # noqa: B023
        )
        wanted = torch.full((5,), -1)
        for number, m in enumerate(best):
            wanted[m] = number
        if len({t["text"] for t in held}) == len(held):
            assert owner[row].tolist() == wanted.tolist()
        else:  # two cats: which is which does not matter
            assert (owner[row] >= 0).tolist() == (wanted >= 0).tolist()
    assert owner[0, 1] == -1
    few = assigned_things(tokens[:1, :2], None, words, NAMES, boxes[:1])
    assert sorted(few[0].tolist()) in ([0, 1], [0, 2], [1, 2])  # of three things two have a token


def test_region_align_names_the_assigned_tokens_and_leaves_the_others_alone():
    torch.manual_seed(0)
    words = torch.randn(4, 8)
    objective = RegionAlign("image", 8)
    around = words - words.mean(0)
    background = words.mean(0) + around.norm(dim=-1).mean() * objective.background.detach()
    tokens = torch.stack([words[2], background, words[0]])
    batch = batch_of(tokens[None], [things("cat", "fox")], words)
    assert objective.targets(batch, words, NAMES).tolist() == [[2, 4, 0]]
    out = objective(batch)
    assert out["word_accuracy"] == 1 and out["word_cosine"] > 0.999


def test_boxes_and_sides_go_to_the_token_of_the_thing():
    torch.manual_seed(0)
    words = torch.randn(4, 64)
    tokens = words[[3, 1, 0]][None].repeat(2, 1, 1)
    boxes = [things("cat", "dog"), things("owl")]
    batch = batch_of(tokens, boxes, words)
    owner, found = token_boxes(batch, "image")
    assert owner.tolist() == [[-1, 1, 0], [2, -1, -1]]
    torch.testing.assert_close(found, torch.tensor([t["xyxy"] for held in boxes for t in held]))
    box = RegionBox("image", 64, reach=0.3)
    length = (words - words.mean(0)).norm(dim=-1).mean()
    code = torch.einsum("nkw,kwd->nd", waves(found), box.axes)
    written = tokens.clone()
    for row, column, number in ((0, 2, 0), (0, 1, 1), (1, 0, 2)):
        offset = written[row, column] - words.mean(0)
        free = written[row, column] - torch.einsum("kwd,d,kwe->e", box.axes, offset, box.axes)
        written[row, column] = free + 0.3 * length * code[number]
    assert box(batch_of(written, boxes, words))["loss"] < 1e-8
    side = RegionSide("image", 64, "words")
    side.axes.copy_(torch.nn.functional.normalize(torch.randn(2, 64), dim=-1))
    assert side(batch)["loss"] > 0 and not side(batch_of(tokens, [[], []], words))["loss"]


def test_latents_learn_what_is_in_a_picture(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path / "cache"))
    settings["streams"]["image"]["connector"] = {
        "type": "perceiver", "num_latents": 4, "num_layers": 1, "hidden_dim": 32, "positions": True,
    }  # fmt: skip
    words = settings["phases"]["words"]
    del words["sources"]["sounds"]
    words |= {"objectives": words["objectives"][:1], "trains": ["image.connector"], "train": {"max_steps": 200}}
    settings["measures"] = {"regions": settings["measures"]["regions"]}
    out = align(parse_config(settings, AlignConfig), tmp_path / "run")
    found = {f.name: f for f in read_figures(out / "final" / "results.json")}["regions"]
    assert found.value > found.control_high and found.value > 0.5, found
