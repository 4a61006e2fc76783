"""A probe's recipes make both of its sides."""

from __future__ import annotations

import torch

from mmllm.align.config import MeasureConfig
from mmllm.train import align_measures


def test_recipes_reach_the_records_that_a_probe_is_fitted_to(monkeypatch):
    asked = []
    records = [{"id": str(i), "label": "ab"[i % 2], "text": "x"} for i in range(8)]

    class Stage:
        def records(self, data, recipes=()):
            asked.append((data, list(recipes)))
            return records

    rows = torch.nn.functional.one_hot(torch.arange(8) % 2, 3).float()
    monkeypatch.setattr(align_measures, "stream_rows", lambda stage, m, stream, held: (rows, list(range(len(held)))))
    template = {"type": "caption_template", "template": "{label}"}
    about = {"streams": ["text"], "field": "label", "train": "t", "recipes": [template]}
    measure = MeasureConfig(name="p", kind="probe", data="v", **about)
    figures = align_measures.probe(Stage(), measure, records)
    assert asked == [("t", [template])] and {f.value for f in figures} == {1.0}
