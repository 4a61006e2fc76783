"""The box objective: closed forms of its code, and gradients that move tokens towards the right bins."""

import pytest
import torch

from mmllm.align.region_box import RegionBox
from mmllm.blocks.box_code import box_axes, box_code, waves
from mmllm.contracts import AlignBatch, Features, Stream
from mmllm.errors import UserError


def batch_of(tokens: torch.Tensor, boxes: list[list[dict]], words: torch.Tensor) -> AlignBatch:
    n, m, d = tokens.shape
    features = Features(tokens, torch.ones(n, m, dtype=torch.bool), tokens.mean(1), grid=(1, 2, 2))
    stream = Stream(token_embedding=tokens, token_mask=features.mask, grid=features.grid)
    return AlignBatch(
        {"image": stream}, [str(i) for i in range(n)], boxes=boxes, extras={"vocabulary": {"embedding": words}}
    )


def test_axes_are_orthonormal_and_the_same_every_time():
    flat = box_axes(64).reshape(24, 64)
    torch.testing.assert_close(flat @ flat.T, torch.eye(24), atol=1e-5, rtol=0)
    assert torch.equal(box_axes(64), box_axes(64))
    with pytest.raises(ValueError, match="24 directions in 16"):
        box_axes(16)


def test_near_values_have_near_codes_of_length_one():
    code = waves(torch.tensor([0.0, 0.1, 0.5, 1.0, 3.0]))
    torch.testing.assert_close(code.norm(dim=-1), torch.ones(5))
    alike = code @ code.T
    assert alike[0, 1] > 0.75 and alike[0, 1] > alike[0, 2] and alike[0, 1] > alike[0, 3]
    assert torch.equal(code[3], code[4])  # out of the picture is its edge
    # cos(pi d) + cos(2 pi d) + cos(3 pi d) over three, for a distance of a half: only the middle one counts
    assert alike[0, 2].item() == pytest.approx(-1 / 3, abs=1e-6)


def test_box_code_holds_the_middles_of_the_bins():
    code = box_code(64, 4)
    torch.testing.assert_close(code.norm(dim=-1), torch.ones(4, 4))
    x1 = torch.einsum("d,wd->w", code[2, 3], box_axes(64)[2])
    torch.testing.assert_close(x1, waves(torch.tensor(0.875)), atol=1e-5, rtol=0)


def test_a_token_written_in_the_code_costs_nothing_and_reads_back_as_its_box():
    words = torch.randn(5, 64)
    objective = RegionBox("image", 64, reach=0.4)
    box = torch.tensor([0.0625, 0.125, 0.5, 0.9375])  # on the fine grid
    length = (words - words.mean(0)).norm(dim=-1).mean()
    code = torch.einsum("kw,kwd->d", waves(box), objective.axes)
    tokens = torch.stack([words.mean(0) + 0.4 * length * code] * 4)[None]
    things = [[{"xyxy": box.tolist(), "text": "cat"}]]
    out = objective(batch_of(tokens, things, words))
    assert out["loss"].item() < 1e-9 and out["box_error"].item() < 1e-6
    torch.testing.assert_close(objective.decode(3 * objective.written(tokens, words))[0, 0], box)


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
