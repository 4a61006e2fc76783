"""AlignModel with streams of other kinds than a picture and a text: videos, and towers without a projection."""

from __future__ import annotations

import pytest
import torch
from tower_families import items

from mmllm.align import AlignModel, load_align, save_align
from mmllm.align.config import HeadConfig
from mmllm.align.model import ProjectionHead
from mmllm.errors import UserError
from mmllm.towers import load_tower

SMALL = {"hidden_size": 32, "layers": 1, "heads": 2}


def test_videos_and_texts_embed_save_and_load(tmp_path):
    torch.manual_seed(0)
    video = load_tower({"model": "tiny:vit", "image_size": 16, **SMALL, "pooling": "attention"}, "video")
    text = load_tower({"model": "tiny:text", **SMALL}, "text")
    heads = {"video": ProjectionHead(32, 32, HeadConfig(identity=True)), "text": ProjectionHead(32, 32, HeadConfig())}
    model = AlignModel({"video": video, "text": text}, {"video": "video", "text": "text"}, heads, {},
                       [("video", "text")], 32).eval()  # fmt: skip
    torch.nn.init.normal_(video.score[1].weight)
    films = [items("vision"), items("vision")[:1]]
    both = model.embed("video", films)
    torch.testing.assert_close(both.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(both[1:], model.embed("video", films[1:]), atol=1e-5, rtol=0)
    save_align(model, tmp_path, {})
    again = load_align(tmp_path)
    torch.testing.assert_close(again.embed("video", films), both)
    torch.testing.assert_close(again.embed("text", ["one", "another"]), model.embed("text", ["one", "another"]))


def test_an_identity_head_has_no_layers():
    head = ProjectionHead(8, 8, HeadConfig(identity=True))
    x = torch.randn(2, 8)
    assert head(x) is x and not list(head.parameters())
    with pytest.raises(UserError, match="identity head has no layers"):
        HeadConfig(identity=True, hidden_dim=4)


def test_activations_of_a_hidden_layer():
    torch.manual_seed(0)
    head, x = ProjectionHead(4, 3, HeadConfig(hidden_dim=5, activation="relu")), torch.randn(2, 4)
    first, last = (m for m in head if isinstance(m, torch.nn.Linear))
    torch.testing.assert_close(head(x), last(first(x).clamp(min=0)))
