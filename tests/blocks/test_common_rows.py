"""Rows of the items that have all streams."""

from __future__ import annotations

import torch

from mmllm.blocks.common_rows import common_rows
from mmllm.contracts import AlignBatch, Features, Stream


def test_first_rows_of_items_that_have_all():
    image = Stream(embedding=torch.zeros(4, 2))
    text = Stream(embedding=torch.zeros(5, 2), owner=torch.tensor([2, 0, 0, 3, 2]))
    sound = Stream(Features(torch.zeros(3, 1, 2), torch.ones(3, 1), torch.zeros(3, 2)), owner=torch.tensor([3, 1, 2]))
    batch = AlignBatch({"image": image, "text": text, "audio": sound}, ids=list("abcd"))
    rows, items = common_rows(batch, ["image", "text", "audio"])
    assert items.tolist() == [2, 3]
    assert {k: v.tolist() for k, v in rows.items()} == {"image": [2, 3], "text": [0, 3], "audio": [2, 0]}
    assert common_rows(batch, ["image"])[1].tolist() == [0, 1, 2, 3]
