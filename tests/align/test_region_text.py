"""The objective that has groups of tokens spell things out: closed forms, and that it is what the box tokens say."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mmllm.align.region_text import RegionText
from mmllm.blocks.box_code import box_code
from mmllm.contracts import AlignBatch, Stream
from mmllm.errors import UserError

DIM, NAMES = 64, {"cat": 0, "dog": 1, "fox": 2}
TABLE = torch.randn(8, DIM, generator=torch.Generator().manual_seed(1))
TABLE = F.normalize(TABLE - TABLE.mean(0), dim=-1)
TABLE = F.normalize(TABLE - TABLE.mean(0), dim=-1)
WORDS = torch.cat([TABLE[:3], -TABLE[:3]])  # mean 0, each of length 1
LEFT, RIGHT = TABLE[3], TABLE[4]


class Words:
    def parameters(self):
        yield TABLE

    def encode(self, texts):
        return {"input_ids": torch.tensor([["left", "right"].index(t) for t in texts])}

    def __call__(self, input_ids):
        return SimpleNamespace(pooled=torch.stack([LEFT, RIGHT])[input_ids])


def objective(**options) -> RegionText:
    made = RegionText("image", DIM, "words", **options)
    made.setup(SimpleNamespace(tower=lambda name: {"words": Words()}[name]))  # type: ignore[arg-type]
    return made


def batch_of(tokens, boxes, labels=None, grid=None, mask=None) -> AlignBatch:
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask
    stream = Stream(token_embedding=tokens, token_mask=mask, grid=grid)
    extras = {"vocabulary": {"embedding": WORDS, "index": {**NAMES, "a": 3, "b": 4, "c": 5}}}
    ids = [str(i) for i in range(len(tokens))]
    return AlignBatch({"image": stream}, ids, boxes=boxes, labels=labels, extras=extras)


def spelled(name: str, side: torch.Tensor, box: tuple[int, int, int, int], bins: int = 16) -> list[torch.Tensor]:
    """What the LLM's own tokens for a thing look like: its word, its side, its two box tokens."""
    x0, y0, x1, y1 = (code[i] for code, i in zip(box_code(DIM, bins), box))
    return [WORDS[NAMES[name]], side, (x0 + y0) / 2**0.5, (x1 + y1) / 2**0.5]


def test_what_reads_like_the_llms_own_tokens_is_as_near_as_can_be():
    made = objective(scale=2.0, parts=["name", "side", "corners"])
    bins = (1, 4, 6, 9)  # of 16: middles 1.5, 4.5, 6.5, 9.5
    thing = {"xyxy": [(b + 0.5) / 16 for b in bins], "text": "fox"}
    about_nothing = [F.normalize(made.background.detach(), dim=0)] * 4
    tokens = torch.stack([*about_nothing, *spelled("fox", LEFT, bins)])[None]
    out = made(batch_of(tokens, [[thing]]))
    assert out["word_accuracy"] == 1
    for name in ("word", "side", "upper_left", "lower_right"):
        assert out[f"{name}_cosine"].item() == pytest.approx(1, abs=1e-5), name
    # What is left is the cross-entropy of cosines 1 and the rest, which no tokens bring to zero.
    logits, _ = made.logits(tokens, WORDS)
    wanted = F.cross_entropy(logits[0, [0, 4]], torch.tensor([6, 2]), reduction="none")
    least = float((wanted * torch.tensor([0.2, 1])).sum().detach() / 1.2)
    assert least > 0.5 and out["loss"].item() == pytest.approx(least, abs=1e-4)


def test_a_thing_goes_to_the_group_that_names_it_and_moving_it_moves_its_own_tokens_alone():
    made = objective(parts=["name", "side", "corners"])
    first, second = (2, 2, 7, 7), (9, 8, 14, 13)
    things = [{"xyxy": [(b + 0.5) / 16 for b in box], "text": n} for n, box in (("cat", first), ("dog", second))]
    tokens = torch.stack([*spelled("dog", RIGHT, second), *spelled("cat", LEFT, first)])[None].requires_grad_()
    good = made(batch_of(tokens, [things]))
    assert all(good[f"{n}_cosine"] > 0.999 for n in ("word", "side", "upper_left", "lower_right"))
    things[0]["xyxy"] = [0.6, 0.1, 0.9, 0.4]  # the cat is somewhere else now
    bad = made(batch_of(tokens, [things]))
    assert bad["word_cosine"] == good["word_cosine"] and bad["side_cosine"] < 0.6 and bad["upper_left_cosine"] < 0.9
    (grad,) = torch.autograd.grad(bad["loss"] - good["loss"], tokens)
    assert grad[0, :4].abs().max() < 1e-5 and (grad[0, 5:].norm(dim=-1) > 1e-3).all()


@pytest.mark.parametrize(("centre", "share"), [(0.2, 0.0), (0.5, 0.5), (0.55, 0.75), (0.9, 1.0)])
def test_between_the_sides_lies_what_stands_in_the_middle(centre, share):
    made = objective(parts=["name", "side"], soft=0.1)
    (side,) = made.wanted(torch.tensor([[centre - 0.1, 0.2, centre + 0.1, 0.5]]), WORDS)[0]
    torch.testing.assert_close(side, LEFT * (1 - share) + RIGHT * share, atol=1e-5, rtol=0)


def test_a_box_in_one_token_is_the_sum_of_its_corners():
    places = torch.tensor([[0.1, 0.2, 0.5, 0.9], [0.3, 0.3, 0.6, 0.7]])
    one = objective(parts=["name", "box"]).wanted(places, WORDS)
    two = objective(parts=["name", "corners"]).wanted(places, WORDS)
    torch.testing.assert_close(one[:, 0], two.sum(1))


def test_without_boxes_all_groups_say_the_label_and_padding_says_nothing():
    made = objective(parts=["name", "corners"])
    tokens = torch.randn(2, 6, DIM, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 3:] = False
    _, target = made.assigned(tokens, mask[:, ::3], WORDS, batch_of(tokens, [[], []], ["dog", "fox"]), NAMES)
    assert target.tolist() == [[1, 1], [2, 2]]
    there = made(batch_of(tokens, [[], []], ["dog", "fox"], mask=mask))
    other = tokens.clone()
    other[1, 3:] = 7.0
    torch.testing.assert_close(there["loss"], made(batch_of(other, [[], []], ["dog", "fox"], mask=mask))["loss"])


def test_mistakes_are_told():
    for options, told in (({"parts": ["name", "sides"]}, "did you mean 'side'"), ({"parts": ["box", "name"]}, "first")):
        with pytest.raises(UserError, match=told):
            objective(**options)
    with pytest.raises(UserError, match="parts without boxes"):
        RegionText("image", 8, "words")
    tokens = torch.randn(1, 6, DIM)
    with pytest.raises(UserError, match="no groups of 4; take 4 queries"):
        objective(parts=["name", "side", "corners"])(batch_of(tokens, [[]]))
    with pytest.raises(UserError, match="on a grid"):
        objective(parts=["name"])(batch_of(tokens, [[]], grid=(1, 2, 3)))
