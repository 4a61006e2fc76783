"""The side objective: its closed form, and the line between two words that it moves tokens along."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mmllm.align.region_side import RegionSide
from mmllm.contracts import AlignBatch, Stream, Tower


class Words(Tower):
    """A text tower that knows four words: the first four unit vectors."""

    modality, hidden_size = "text", 8

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.eye(8), requires_grad=False)

    def encode(self, texts):
        return {"input_ids": torch.tensor([["left", "right", "top", "bottom"].index(t) for t in texts])}

    def forward(self, input_ids, **_):  # type: ignore[override]
        return SimpleNamespace(pooled=self.table[input_ids])


def objective(**options) -> RegionSide:
    made = RegionSide("image", 8, "words", **options)
    made.setup(SimpleNamespace(tower=lambda name: {"words": Words()}[name]))  # type: ignore[arg-type]
    return made


def batch_of(tokens: torch.Tensor, boxes: list[list[dict]]) -> AlignBatch:
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
    words = torch.cat([torch.eye(8), -torch.eye(8)])  # mean 0, length 1
    stream = Stream(token_embedding=tokens, token_mask=mask, grid=(1, 2, 2))
    return AlignBatch({"image": stream}, ["0"], boxes=boxes, extras={"vocabulary": {"embedding": words}})


def test_the_lines_run_from_word_to_word():
    axes = objective().axes
    right = F.normalize(torch.tensor([-1.0, 1, 0, 0, 0, 0, 0, 0]), dim=0)
    bottom = F.normalize(torch.tensor([0, 0, -1.0, 1, 0, 0, 0, 0]), dim=0)
    torch.testing.assert_close(axes, torch.stack([right, bottom]))


@pytest.mark.parametrize(("box", "wanted"), [
    ([0.0, 0.0, 0.5, 0.5], (-1.0, -1.0)),   # all the way to the upper left
    ([0.4, 0.6, 0.8, 1.0], (0.5, 1.0)),     # a tenth right of the middle: half the way
])  # fmt: skip
def test_a_token_that_lies_where_it_should_costs_nothing(box, wanted):
    made = objective(reach=0.5, soft=0.2)
    right = torch.tensor([wanted[0], wanted[1]]) * 0.5 @ made.axes
    name = torch.tensor([0, 0, 0, 0, 0, 0, 0.7, 0])  # whatever else it says
    tokens = (right + name).expand(1, 4, 8)
    out = made(batch_of(tokens, [[{"xyxy": box, "text": "cat"}]]))
    assert out["loss"].item() == pytest.approx(0, abs=1e-9)
    assert out["side_accuracy"] == 1


def test_only_tokens_on_things_move_and_only_along_the_lines():
    made = objective()
    tokens = torch.zeros(1, 4, 8, requires_grad=True)
    made(batch_of(tokens, [[{"xyxy": [0.0, 0.0, 0.5, 0.5], "text": "cat"}]]))["loss"].backward()
    assert tokens.grad is not None
    assert tokens.grad[0, 1:].abs().sum() == 0
    assert tokens.grad[0, 0, 4:].abs().sum() == 0 and tokens.grad[0, 0, 0] != 0
    # downhill is towards "left" and "top"
    assert tokens.grad[0, 0, 0] < 0 < tokens.grad[0, 0, 1] and tokens.grad[0, 0, 2] < 0 < tokens.grad[0, 0, 3]


def test_a_scene_without_things_gives_zero():
    assert objective()(batch_of(torch.randn(1, 4, 8), [[]]))["loss"].item() == 0.0
