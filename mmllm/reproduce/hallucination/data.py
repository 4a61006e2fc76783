"""The data of the hallucination experiment: planted scenes for training, choosing (dev) and judging (test)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field

from mmllm.config import StrictModel
from mmllm.data import questions as q
from mmllm.data.planted import Draw, PlantedComposer, PlantedConfig, Prior, plant, split_tiles
from mmllm.data.starter_sets import write_jsonl
from mmllm.data.tiles import Tile, tile_loader
from mmllm.data.workers import Workers
from mmllm.errors import UserError, unknown

VERSION = 1  # raise it when the code makes other data from the same plan
# Numbers that stand for the sets in a scene's seed; never renumber. With each its cut-outs and how it is drawn.
SETS: dict[str, tuple[int, str, Draw]] = {
    "train": (0, "train", "natural"),
    "dev_regions": (1, "dev", "natural"),
    "dev_twins": (2, "dev", "anchored"),
    "natural": (3, "test", "natural"),
    "twins": (4, "test", "anchored"),
    "swapped": (5, "test", "swapped"),
}
TWINS = ("shown", "hidden")


class DataPlan(StrictModel):
    """How much of everything is made.

    Attributes:
        seed: of the pairs, the parts of the cut-outs and the scenes.
        labels: names of things, or how many from the beginning of the source's vocabulary; of them ``pairs`` pairs are
            planted.
        train, dev_regions, dev_twins, natural, twins, swapped: scenes (pairs of scenes) of each set.
        scene: probabilities and looks.
        kinds: questions about each training scene; see ``mmllm.data.questions.scene_questions``.
    """

    seed: int = 0
    labels: int | list[str] = 26
    pairs: int = Field(default=8, ge=1)
    train: int = Field(default=2000, ge=1)
    dev_regions: int = Field(default=60, ge=1)
    dev_twins: int = Field(default=40, ge=1)
    natural: int = Field(default=80, ge=1)
    twins: int = Field(default=120, ge=1)
    swapped: int = Field(default=60, ge=1)
    scene: PlantedConfig = Field(default_factory=PlantedConfig)
    kinds: list[str] = ["caption", *["exists"] * 6]


def data_key(plan: DataPlan, source: Path) -> dict[str, Any]:
    """Everything that the data depend on: the plan and the dataset that the cut-outs come from."""
    about = json.loads((source / "dataset.json").read_text(encoding="utf-8"))
    return {"plan": plan.model_dump(), "source": about.get("recipe_hash"), "version": VERSION}


def read_tiles(source: Path, labels: int | list[str]) -> dict[str, list[Tile]]:
    """The cut-outs of things of a starter dataset's vocabulary, by all vendors.

    Raises:
        UserError: the dataset has fewer things, or not these.
    """
    concepts = json.loads((source / "concepts.json").read_text(encoding="utf-8"))["vocabulary"]
    names = [c["label"] for c in concepts]
    if isinstance(labels, int):
        if len(names) < labels:
            do = "take starter:full, or fewer labels"
            raise UserError(f"the dataset has {len(names)} things, {labels} are wanted", source, do)
        labels = names[:labels]
    for label in labels:
        if label not in names:
            raise unknown("thing", label, names, source)
    pools: dict[str, list[Tile]] = {}
    for c in (concepts[names.index(label)] for label in labels):
        drawn = [*c["seen"], *c["new"]]
        ids = [i for i in drawn if (source / f"tiles/{i}.png").is_file()]  # some art could not be rendered
        pools[c["label"]] = [Tile(i, i.split("/")[0], i.split("/", 1)[1], c["label"], c["block"], c["subgroup"],
                                  f"tiles/{i}.png") for i in ids]  # fmt: skip
    return pools


def scene_records(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Composes scenes ``start`` to ``stop`` of a set and saves them; returns their records, paths in the dataset.

    PNG without loss, since twins must be equal in every pixel outside B.
    """
    folder, name, plan = job["folder"], job["set"], job["plan"]
    number, _, draw = SETS[name]
    composer = PlantedComposer(job["prior"], job["pools"], tile_loader(job["source"]), plan.scene, name == "train")
    out: list[dict[str, Any]] = []
    for i in range(job["start"], job["stop"]):
        if draw == "anchored":
            twins = composer.twins(plan.seed, number, i)
            a, b = job["prior"].pairs[twins.pair]
            made = [(f"{name}/{i:05d}_{t}", scene, {"a": a, "b": b, "twin": t})
                    for t, scene in zip(TWINS, (twins.shown, twins.hidden))]  # fmt: skip
        else:
            made = [(f"{name}/{i:05d}", composer.scene(plan.seed, number, i, draw=draw), {})]
        for key, scene, meta in made:
            path = f"scenes/{key}.png"
            Image.fromarray(scene.image).save(folder / path, compress_level=1)
            meta["tiles"] = [t.tile for t in scene.things]
            out.append({"id": key, "image": f"../{path}", "boxes": scene.boxes(), "meta": meta})
    return out


def conversations(
    records: list[dict[str, Any]], labels: list[str], kinds: list[str], seed: int
) -> list[dict[str, Any]]:
    """One picture and its questions as branches; absent things are drawn evenly from all labels."""
    out = []
    for i, r in enumerate(records):
        asked = q.scene_questions(r["boxes"], labels, np.random.default_rng((seed, 33, i)), kinds=kinds)
        record = {"id": f"tune/{r['id']}", "messages": q.picture_prefix([r["image"]])}
        out.append(record | {"branches": [q.branch(x) for x in asked]})
    return out


def build(plan: DataPlan, source: Path, folder: Path, workers: int = 2) -> None:
    """Fills ``folder``: ``scenes/``, ``align/``, ``tune/``, ``eval/SET.jsonl``, ``planted.json``, ``dataset.json``."""
    tiles = read_tiles(source, plan.labels)
    prior = plant(list(tiles), plan.pairs, plan.seed)
    parts = {label: split_tiles([t.id for t in pool], plan.seed, label) for label, pool in tiles.items()}
    jobs = []
    for name, (_, part, _) in SETS.items():
        (folder / "scenes" / name).mkdir(parents=True, exist_ok=True)
        pools = {label: [t for t in pool if t.id in parts[label][part]] for label, pool in tiles.items()}
        n = getattr(plan, name)
        step = max(50, n // 4)
        common = {"folder": folder, "set": name, "plan": plan, "prior": prior, "pools": pools, "source": source}
        jobs += [common | {"start": i, "stop": min(n, i + step)} for i in range(0, n, step)]
    made: dict[str, list[dict[str, Any]]] = {name: [] for name in SETS}
    for job, records in zip(jobs, Workers(workers).map(scene_records, jobs)):
        made[job["set"]] += records
    write_jsonl(folder / "align" / "regions_train.jsonl", made["train"])
    weak = {b for _, b in prior.pairs}
    for part, keep in (("strong", lambda box: box["text"] not in weak), ("weak", lambda box: box["text"] in weak)):
        rows = [r | {"boxes": [b for b in r["boxes"] if keep(b)]} for r in made["dev_regions"]]
        write_jsonl(folder / "align" / f"regions_dev_{part}.jsonl", rows)
    write_jsonl(folder / "tune" / "train.jsonl", conversations(made["train"], prior.labels, plan.kinds, plan.seed))
    for name in SETS:
        if name not in ("train", "dev_regions"):
            write_jsonl(folder / "eval" / f"{name}.jsonl", made[name])
    _write(folder / "planted.json", {**asdict(prior), "parts": parts})
    about = json.loads((source / "dataset.json").read_text(encoding="utf-8"))
    info = {"name": "planted", "seed": plan.seed, "sources": about.get("sources", [])}
    _write(folder / "dataset.json", info | {"missing": about.get("missing", [])})


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_prior(folder: Path) -> Prior:
    """What was planted in a dataset that ``build`` made."""
    data = json.loads((folder / "planted.json").read_text(encoding="utf-8"))
    return Prior(tuple((a, b) for a, b in data["pairs"]), tuple(data["clean"]))
