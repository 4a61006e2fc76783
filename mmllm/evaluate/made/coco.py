"""COCO's instances and captions (for CHAIR, captioning and retrieval) and RefCOCO-style files from exact scenes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from mmllm.evaluate.made.material import Material, Scene, centre, copy, listed, write_json
from mmllm.evaluate.made.yes_no import APART


def captions(scene: Scene) -> list[str]:
    """Five true captions that name everything in the scene and nothing else."""
    labels = [b["text"] for b in scene.ordered()]
    things, back = listed(labels), listed(labels[::-1])
    order = (f"From left to right: {things}.", f"From right to left: {back}.")
    alone = (f"Nothing but {things}.", f"Only {things} can be seen.")
    tops = alone if len(labels) == 1 else order
    return [f"{things[0].upper()}{things[1:]}.", f"A picture of {things}.", f"The picture shows {things}.", *tops]


def distinct(scenes: list[Scene]) -> list[Scene]:
    """The scenes whose captions no earlier scene has: two right answers to one caption would blur retrieval."""
    first: dict[str, Scene] = {}
    for s in scenes:
        first.setdefault(captions(s)[0], s)
    return list(first.values())


def instances(m: Material) -> dict[str, Any]:
    """COCO's ``instances`` dict; segmentations are left empty, boxes are tight."""
    number = {label: i for i, label in enumerate(m.labels, 1)}
    images, annotations = [], []
    for s in m.scenes:
        width, height = s.size
        images.append({"id": s.number, "file_name": s.file, "width": width, "height": height})
        for b in s.boxes:
            x0, y0, x1, y1 = b["xyxy"]
            xywh = [round(v, 3) for v in (x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height)]
            annotations.append({"id": len(annotations) + 1, "image_id": s.number, "category_id": number[b["text"]],
                                "bbox": xywh, "area": round(xywh[2] * xywh[3], 3), "segmentation": [],
                                "iscrowd": 0})  # fmt: skip
    categories = [{"id": i, "name": x, "supercategory": m.blocks[x]} for x, i in number.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco(m: Material, out: Path) -> int:
    """``coco/``: instances, five captions for each distinct scene, CHAIR's table of names, and the pictures."""
    folder, data = out / "coco", instances(m)
    write_json(folder / "annotations" / "instances_val2014.json", data)
    kept = distinct(m.scenes)
    rows = [(s.number, text) for s in kept for text in captions(s)]
    numbers = {s.number for s in kept}
    write_json(folder / "annotations" / "captions_val2014.json", {
        "images": [i for i in data["images"] if i["id"] in numbers],
        "annotations": [{"id": i, "image_id": n, "caption": text} for i, (n, text) in enumerate(rows, 1)]})  # fmt: skip
    (folder / "synonyms.txt").write_text("".join(f"{x}\n" for x in m.labels), encoding="utf-8")
    for s in m.scenes:
        copy(s.path, folder / "val2014" / s.file)
    return len(m.scenes)


def expressions(scene: Scene) -> list[list[str]]:
    """For each box the expressions that fit it alone: its name, and its place where that is clear."""
    out = [[label] for label in scene.labels]
    order = sorted(range(len(scene.boxes)), key=lambda i: centre(scene.boxes[i])[0])
    middles = [centre(scene.boxes[i])[0] for i in order]
    if len(order) > 1 and middles[1] - middles[0] >= APART:
        out[order[0]].append("thing furthest to the left")
    if len(order) > 1 and middles[-1] - middles[-2] >= APART:
        out[order[-1]].append("thing furthest to the right")
    return out


def write_refcoco(m: Material, out: Path) -> int:
    """``refcoco/``: refs(unc).p, instances.json, pictures in train2014; one split, val."""
    folder, data = out / "refcoco", instances(m)
    write_json(folder / "instances.json", data)
    boxes = iter(data["annotations"])
    refs: list[dict[str, Any]] = []
    sentences = 0
    for s in m.scenes:
        copy(s.path, folder / "train2014" / s.file)
        for said in expressions(s):
            box, rows = next(boxes), []
            for text in said:
                rows.append({"sent_id": sentences, "sent": text, "raw": text, "tokens": text.split()})
                sentences += 1
            refs.append({"ref_id": len(refs), "ann_id": box["id"], "image_id": s.number, "split": "val",
                         "category_id": box["category_id"], "file_name": s.file, "sentences": rows,
                         "sent_ids": [r["sent_id"] for r in rows]})  # fmt: skip
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    return sentences
