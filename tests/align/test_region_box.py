"""The box objective: closed forms of its code, and gradients that move tokens towards the right bins."""

import pytest
import torch

from mmllm.align.region_box import RegionBox, soft_bins
from mmllm.blocks.box_code import box_code
from mmllm.contracts import AlignBatch, Features, Stream
from mmllm.errors import UserError


def batch_of(tokens: torch.Tensor, boxes: list[list[dict]], words: torch.Tensor) -> AlignBatch:
    n, m, d = tokens.shape
    features = Features(tokens, torch.ones(n, m, dtype=torch.bool), tokens.mean(1), grid=(1, 2, 2))
    stream = Stream(token_embedding=tokens, token_mask=features.mask, grid=features.grid)
    return AlignBatch(
        {"image": stream}, [str(i) for i in range(n)], boxes=boxes, extras={"vocabulary": {"embedding": words}}
    )


def test_code_is_orthonormal_and_the_same_every_time():
    code = box_code(64, 10)
    flat = code.reshape(40, 64)
    torch.testing.assert_close(flat @ flat.T, torch.eye(40), atol=1e-5, rtol=0)
    assert torch.equal(code, box_code(64, 10))


def test_soft_bins_share_linearly_between_neighbouring_centres():
    got = soft_bins(torch.tensor([0.05, 0.10, 0.999, 0.0]), 10)
    assert got.sum(-1).tolist() == pytest.approx([1, 1, 1, 1])
    assert got[0, 0].item() == pytest.approx(1)
    assert got[1, :2].tolist() == pytest.approx([0.5, 0.5])
    assert got[2, 9].item() == pytest.approx(1)


def test_a_token_written_in_the_code_has_a_low_loss_and_reads_back_as_its_box():
    words = torch.randn(5, 64)
    objective = RegionBox("image", 64, scale=40.0)
    box = torch.tensor([0.05, 0.15, 0.45, 0.95])  # bin centres
    length = (words - words.mean(0)).norm(dim=-1).mean()
    written = words.mean(0) + length * torch.einsum("kc,kcd->d", soft_bins(box, 10), objective.code)
    tokens = torch.stack([written] * 4)[None]
    things = [[{"xyxy": box.tolist(), "text": "cat"}]]
    out = objective(batch_of(tokens, things, words))
    assert out["loss"].item() < 0.01 and out["box_error"].item() < 1e-3
    torch.testing.assert_close(objective.decode(objective.logits(tokens, words))[0, 0], box, atol=1e-3, rtol=0)


def test_background_cells_do_not_count_and_an_empty_scene_gives_zero():
    words, objective = torch.randn(5, 64), RegionBox("image", 64)
    tokens = torch.randn(1, 4, 64, requires_grad=True)
    things = [[{"xyxy": [0.0, 0.0, 0.5, 0.5], "text": "cat"}]]  # covers the first cell only
    objective(batch_of(tokens, things, words))["loss"].backward()
    assert tokens.grad[0, 0].abs().sum() > 0 and tokens.grad[0, 1:].abs().sum() == 0
    assert objective(batch_of(tokens, [[]], words))["loss"].item() == 0.0


def test_only_the_cell_of_the_centre_carries_the_box_where_that_is_asked():
    words = torch.randn(5, 64)
    objective = RegionBox("image", 64, cells="centre")
    tokens = torch.randn(1, 4, 64, requires_grad=True)
    things = [[{"xyxy": [0.0, 0.0, 0.9, 0.9], "text": "cat"}, {"xyxy": [0.6, 0.6, 1.0, 1.0], "text": "dog"}]]
    objective(batch_of(tokens, things, words))["loss"].backward()  # centres in the first and in the last cell
    moved = tokens.grad[0].abs().sum(-1) > 0
    assert moved.tolist() == [True, False, False, True]
    with pytest.raises(UserError, match="centre"):
        RegionBox("image", 64, cells="center")
