"""Videos: frames through any picture tower, pooled over time under a mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mmllm.errors import UserError
from mmllm.towers import apply_train, build_tower, load_tower, save_tower, video_inputs

VIT = {"model": "tiny:vit", "image_size": 16, "patch_size": 8, "hidden_size": 32, "layers": 2, "heads": 2}


def videos(*lengths):
    rng = np.random.default_rng(0)
    return [[Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(n)] for n in lengths]


@pytest.fixture
def tower(request):
    torch.manual_seed(0)
    made = load_tower({**VIT, "pooling": request.param}, "video")
    if made.score is not None:
        torch.nn.init.normal_(made.score[1].weight)
    return made


both = pytest.mark.parametrize("tower", ["mean", "attention"], indirect=True)


@both
def test_pooled_is_the_weighted_mean_of_the_frames(tower):
    inputs = video_inputs(tower.preprocessor(), videos(3))
    with torch.no_grad():
        out = tower(**inputs)
        frames = tower.vision(pixel_values=inputs["pixel_values"][0])
        weights = torch.full((3,), 1 / 3)
        if tower.score is not None:
            weights = tower.score(frames.pooled)[:, 0].softmax(0)
            assert weights.max() > 0.4
    torch.testing.assert_close(out.pooled[0], (weights[:, None] * frames.pooled).sum(0))
    assert out.grid == (3, 2, 2) and torch.equal(out.tokens[0], frames.tokens.flatten(0, 1))
    assert out.tokens.shape[1] == tower.num_tokens(3)


@both
def test_a_padded_batch_gives_what_each_video_gives_alone(tower):
    many = videos(4, 1, 2)
    with torch.no_grad():
        out = tower(**video_inputs(tower.preprocessor(), many), layers=(1,))
        for i, video in enumerate(many):
            alone = tower(**video_inputs(tower.preprocessor(), [video]), layers=(1,))
            torch.testing.assert_close(out.pooled[i], alone.pooled[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(out.tokens[i, out.mask[i]], alone.tokens[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(out.layers[1][i, out.mask[i]], alone.layers[1][0], atol=1e-5, rtol=1e-5)
    assert out.mask.sum(1).tolist() == [16, 4, 8]


def test_attention_starts_as_the_mean_and_learns():
    torch.manual_seed(0)
    tower = load_tower({**VIT, "pooling": "attention", "train": {"last_n": 1}}, "video")
    mean = load_tower({**VIT}, "video")
    mean.vision.load_state_dict(tower.vision.state_dict())
    inputs = video_inputs(tower.preprocessor(), videos(3, 2))
    torch.testing.assert_close(tower(**inputs).pooled, mean(**inputs).pooled)
    tower(**inputs).pooled.square().sum().backward()
    names = {n for n, p in tower.named_parameters() if p.grad is not None}
    assert "score.1.weight" in names and not any("layers.0" in n or "patch" in n for n in names)
    assert apply_train(tower, "none") == [] and not any(p.requires_grad for p in tower.parameters())


@both
def test_saved_and_rebuilt(tower, tmp_path):
    inputs = video_inputs(tower.preprocessor(), videos(2, 3))
    save_tower(tower, tmp_path)
    again = load_tower(str(tmp_path), "video")
    rebuilt = build_tower(tower.to_config()).eval()
    rebuilt.load_state_dict(tower.state_dict())
    with torch.no_grad():
        assert torch.equal(again(**inputs).pooled, tower(**inputs).pooled)
        assert torch.equal(rebuilt(**inputs).pooled, tower(**inputs).pooled)


def test_no_valid_frame_gives_zeros(tmp_path):
    tower = load_tower({**VIT, "pooling": "attention"}, "video")
    inputs = video_inputs(tower.preprocessor(), videos(2, 2))
    inputs["frame_mask"][1] = False
    out = tower(**inputs)
    assert bool((out.pooled[1] == 0).all()) and bool(out.pooled.isfinite().all())
    with pytest.raises(ValueError, match="no frames"):
        video_inputs(tower.preprocessor(), [[]])


def test_frames_of_any_family_but_naflex(folder_of):
    tower = load_tower({"model": str(folder_of("clip")), "pooling": "mean"}, "video")
    out = tower(**video_inputs(tower.preprocessor(), videos(2)))
    assert out.grid == (2, 4, 4) and out.pooled.shape == (1, 32)
    with pytest.raises(UserError, match="one size"):
        load_tower(str(folder_of("siglip2")), "video")
