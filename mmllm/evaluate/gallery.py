"""Items of the report's gallery from predictions.jsonl: held-out media drawn at random with a fixed seed."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.errors import UserError
from mmllm.evaluate.grounding import parse_boxes
from mmllm.report.html import Answered, Item


def gallery_items(
    predictions: str | Path, scenes: int = 12, sounds: int = 6, seed: int = 0, questions: int = 6
) -> list[Item]:
    """Random scenes and sounds with all that was asked about them (at most ``questions`` of the yes/no kind).

    Args:
        predictions: the file that ``mmllm eval`` wrote.

    Raises:
        UserError: no such file.
    """
    path = Path(predictions)
    if not path.is_file():
        raise UserError("no predictions here", path, "run mmllm eval first")
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if not row["control"] and row["split"] != "validation":
            groups[tuple(row["media"])].append(row)
    kinds: dict[str, list[tuple[str, ...]]] = {"image": [], "audio": []}
    for media, rows in groups.items():
        kinds["audio" if rows[0]["task"] == "hear" else "image"].append(media)
    rng = np.random.default_rng(seed)
    items = []
    # Free answers (captions, boxes) tell most: draw from the scenes that have them, when there are any.
    rich = [m for m in kinds["image"] if any(r["task"] == "caption" for r in groups[m])]
    for kind, pool, count in (("image", rich or kinds["image"], scenes), ("audio", kinds["audio"], sounds)):
        for i in rng.permutation(len(pool))[:count]:
            items.append(_item(list(pool[i]), kind, groups[pool[i]], questions))
    return items


def _item(media: list[str], kind: str, rows: list[dict[str, Any]], questions: int) -> Item:
    item = Item(f"{Path(media[0]).name}, {rows[0]['split'].replace('_', ' ')}", media, kind)
    asked = 0
    for row in sorted(rows, key=lambda r: r["task"] == "pope"):
        if row["task"] == "pope":
            asked += 1
            if asked > questions:
                continue
        truth = row["gold"]
        if row["task"] == "caption":
            truth = row.get("meta", {}).get("caption", truth)
        elif row["task"] == "box":
            name = row.get("meta", {}).get("object", "")
            item.boxes.append((*truth, name, "truth"))
            item.boxes += [(*b, name, "answer") for b in parse_boxes(row["answer"])[:1]]
            truth = "green box"
        right = row["hit"] >= row["weight"]
        item.answered.append(Answered(row["question"], row["answer"], str(truth), bool(right)))
    return item
