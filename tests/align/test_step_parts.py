"""What a step hands to its hooks, and parameters that two parts share."""

from __future__ import annotations

import torch

from mmllm.align.objectives import InfoNCE
from mmllm.align.step import AlignStep, Term
from mmllm.contracts import Stream
from mmllm.train.align_trains import once


class Linear(torch.nn.Module):
    """Stands where the AlignModel does: a matrix per stream."""

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.ParameterDict({s: torch.nn.Parameter(torch.eye(4)) for s in ("image", "text")})
        self.logit_scale = torch.nn.ParameterDict({"image:text": torch.nn.Parameter(torch.tensor(1.0))})
        self.logit_bias = torch.nn.ParameterDict()

    def scale(self, pair):
        return self.logit_scale[pair].exp()

    def stream(self, name, inputs, want=()):
        return Stream(embedding=torch.nn.functional.normalize(inputs["x"] @ self.weights[name], dim=-1))


def test_hooks_find_the_embeddings_with_their_graph():
    want = {"things": {"image": {"embedding"}, "text": {"embedding"}}}
    step = AlignStep(Linear(), [InfoNCE(["image", "text"])], [Term("infonce", 1.0, ("things",))], want)
    rows = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    made = {"streams": {"image": {"x": rows[0]}, "text": {"x": rows[1]}}, "ids": list("abc"), "labels": None}
    out = step({"sources": {"things": {**made, "boxes": None}}})
    seen = out["batches"]["things"].streams["image"].embedding
    (g,) = torch.autograd.grad(out["loss"], seen, retain_graph=True)
    assert g.shape == (3, 4) and g.abs().sum() > 0


def test_a_shared_parameter_trains_in_the_first_group_that_has_it():
    a, b, c = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    found = once([("image.connector", [a, b], None), ("text.connector", [b, c], 0.1)])
    assert [(n, [id(p) for p in ps], r) for n, ps, r in found] == [
        ("image.connector", [id(a), id(b)], None), ("text.connector", [id(c)], 0.1)
    ]  # fmt: skip
