"""Builds the starter dataset folder from a recipe: tiles, scenes, speech and record files, all from one seed."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmllm.config import find_config
from mmllm.data import pico, speech, stamps
from mmllm.data import starter_sets as sets
from mmllm.data.cache import PART, cache_root, locked, require_space
from mmllm.data.concepts import Concept, assign_splits, checksum, concept_groups, read_manifest, scene_vocabulary
from mmllm.data.emoji import load_names, read_vendor
from mmllm.data.recipe import Recipe, Size, Vendors, parse_recipe, recipe_hash
from mmllm.data.scenes import SceneConfig
from mmllm.data.sources import RECIPES, FetchReport, fetch_sources, load_recipe, sources_of
from mmllm.data.tiles import Art, Tile
from mmllm.data.workers import Workers, scene_job, speech_job, tile_job
from mmllm.errors import UserError

SPEECH_CHUNK = 240  # names spoken by one process; part of the content, since eSpeak's noise goes on from clip to clip


def say(text: str) -> None:
    """A line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def _chunks(items: Sequence[Any], size: int) -> list[Any]:
    return [items[i : i + size] for i in range(0, len(items), size)]


# ---- the stages


def read_art(paths: dict[str, Path], vendors: Vendors) -> list[Art]:
    """All art of the recipe's vendors that are there."""
    names = load_names(paths.get("emojibase"), paths.get("emoji-data"))
    art: list[Art] = []
    for vendor in [*vendors.train, *vendors.held_out]:
        if vendor in paths:
            folder = paths[vendor]
            art += stamps.read_stamps(folder) if vendor == "stamps" else read_vendor(vendor, folder, names)
    return art


def choose_vendors(recipe: Recipe, paths: dict[str, Path]) -> Vendors:
    """The recipe's vendors, or its ``pip_only`` ones when no held-out vendor could be had; says so loudly.

    Raises:
        UserError: not even those are there.
    """
    if any(v in paths for v in recipe.vendors.held_out):
        return recipe.vendors
    say(
        "WARNING: none of the held-out vendors "
        f"({', '.join(recipe.vendors.held_out)}) could be had; falling back to art from pip only: "
        f"{', '.join(recipe.pip_only.train)} train, {', '.join(recipe.pip_only.held_out)} is the new vendor."
    )
    for side in (recipe.pip_only.train, recipe.pip_only.held_out):
        if not any(v in paths for v in side):
            raise UserError(f"none of the art of {', '.join(side)} is there", do="run mmllm doctor")
    return recipe.pip_only


def pick_art(art: list[Art], groups: dict[str, str], vocabulary: list[Concept], limit: int | None) -> list[Art]:
    """At most about ``limit`` pictures: the vocabulary's groups first, then others in an order given by their names."""
    if limit is None or len(art) <= limit:
        return art
    in_scenes = {i for c in vocabulary for i in (*c.seen, *c.new)}
    count: dict[str, int] = {}
    for a in art:
        count[groups[a.id]] = count.get(groups[a.id], 0) + 1
    order = sorted(count, key=lambda g: hashlib.sha256(f"pick {g}".encode()).hexdigest())
    keep: set[str] = set()
    total = len(in_scenes)
    for g in order:
        if total + count[g] > limit:
            break
        keep.add(g)
        total += count[g]
    return [a for a in art if a.id in in_scenes or groups[a.id] in keep]


def build_tiles(art: list[Art], folder: Path, workers: Workers) -> tuple[list[Tile], list[str]]:
    """Renders all art; the slow three-dimensional drawings are spread over the pieces of work."""
    pieces = _chunks(sorted(art, key=lambda a: hashlib.sha256(a.id.encode()).hexdigest()), 250)
    tiles: list[Tile] = []
    problems: list[str] = []
    for made, bad in workers.map(tile_job, [(p, folder) for p in pieces]):
        tiles += made
        problems += bad
    return sorted(tiles, key=lambda t: t.id), sorted(problems)


def build_scenes(
    recipe: Recipe,
    size: Size,
    vocabulary: list[Concept],
    tiles: list[Tile],
    photos: list[Path],
    folder: Path,
    workers: Workers,
) -> dict[str, sets.Scenes]:
    """All scene sets. Training scenes vary art and co-occurrence; the others show the art as it is."""
    by_id = {t.id: t for t in tiles}
    pools = {
        kind: {c.label: [by_id[i] for i in getattr(c, kind) if i in by_id] for c in vocabulary}
        for kind in ("seen", "new")
    }
    blocks = {c.label: c.block for c in vocabulary}
    plain = recipe.scene.model_copy(update={"augment": False, "beta": 0.0})
    train = recipe.scene.model_copy(update={"augment": True, "beta": recipe.train_beta})
    held_photos = photos[::3]
    seen_photos = [p for p in photos if p not in held_photos]
    wanted: dict[str, tuple[int, str, SceneConfig, list[Path]]] = {
        "train": (size.train_scenes, "seen", train, seen_photos),
        "val": (size.val_scenes, "seen", plain, held_photos),
        "val_new_vendor": (size.val_scenes, "new", plain, held_photos),
        "eval_seen": (size.eval_scenes, "seen", plain, held_photos),
        "eval_new_vendor": (size.eval_scenes, "new", plain, held_photos),
        "interleaved": (3 * size.interleaved_eval, "seen", plain, held_photos),
    }
    jobs = []
    for name, (n, pool, config, backgrounds) in wanted.items():
        (folder / "scenes" / name).mkdir(parents=True, exist_ok=True)
        common = {"folder": folder, "set": name, "pools": pools[pool], "blocks": blocks, "config": config}
        common |= {"photos": backgrounds, "seed": recipe.seed}
        step = max(100, n // 4)
        jobs += [common | {"start": i, "stop": min(n, i + step)} for i in range(0, n, step)]
    scenes: dict[str, sets.Scenes] = {name: [] for name in wanted}
    for job, made in zip(jobs, workers.map(scene_job, jobs)):
        scenes[job["set"]] += made
    return scenes


def build_speech(
    recipe: Recipe, size: Size, tiles: list[Tile], vocabulary: list[Concept], recordings: list[stamps.Recording],
    folder: Path, workers: Workers, with_pico: bool,
) -> tuple[dict[str, sets.Clips], list[str]]:  # fmt: skip
    """Spoken names in training and (some of them) in held-out voices, real recordings; and the names to ask about."""
    vocabulary_names = [c.label for c in vocabulary]
    recorded = [r.label for r in recordings]
    others = sorted({t.label for t in tiles if len(t.label.split()) <= 3} - set(vocabulary_names) - set(recorded))
    others.sort(key=lambda n: hashlib.sha256(f"name {n}".encode()).hexdigest())
    names = list(dict.fromkeys([*vocabulary_names, *recorded, *others]))[: size.spoken_names]
    common = {t.label for t in tiles if t.vendor != "stamps"} | set(vocabulary_names)
    single = [n for n in names if n.isalpha() and len(n) > 2 and n in common]  # not "xanthia" or "wapiti"
    hear_names = single[: size.hear_names]
    held = [*hear_names, *(n for n in names if n not in set(hear_names))][: size.held_out_names]
    jobs = []
    spoken = recipe.voices
    every = [v for v in spoken.every if with_pico or not v.startswith(pico.PREFIX)]
    for chosen, voices, vary in ((names, spoken.train, True), (held, spoken.held_out, False)):
        for chunk in _chunks(list(enumerate(chosen)), SPEECH_CHUNK):
            drawn = (spoken.per_name, every) if vary else (None, [])
            jobs.append((folder, chunk, voices, recipe.seed, vary, *drawn))
    clips: dict[str, sets.Clips] = {"train": [], "heldout_voices": [], "real": []}
    for job, made in zip(jobs, workers.map(speech_job, jobs, fresh=True)):
        clips["train" if job[4] else "heldout_voices"] += made
    for r in recordings:
        if r.label not in names:
            continue
        path = f"audio/real/{speech.slug(r.key)}.wav"
        speech.write_wav(folder / path, speech.read_recording(r.path))
        clips["real"].append((r.label, "human", path))
    return clips, hear_names


def write_records(
    recipe: Recipe, size: Size, folder: Path, vendors: Vendors, tiles: list[Tile], groups: dict[str, str],
    splits: dict[str, str], vocabulary: list[Concept], scenes: dict[str, sets.Scenes], clips: dict[str, sets.Clips],
    hear_names: list[str],
) -> dict[str, int]:  # fmt: skip
    """Writes every record file; returns file -> number of records."""
    labels = [c.label for c in vocabulary]
    related = {c.label: [o.label for o in vocabulary if o.block == c.block and o.label != c.label] for c in vocabulary}
    split_of_name = {t.label: splits[t.id] for t in tiles}
    seen, new = "+".join(vendors.train), "+".join(vendors.held_out)
    hear_train = [c for c in clips["train"] if c[0] in set(hear_names)]
    hear_test = [c for c in clips["heldout_voices"] if c[0] in set(hear_names)]
    seed = recipe.seed
    several = sets.interleaved_conversations(
        scenes["train"], size.interleaved_train, labels, seed, "interleaved", False
    )
    pretrain = [*sets.caption_conversations(scenes["train"]), *sets.naming_conversations(hear_train)]
    files = {f"align/image_{k}": v for k, v in sets.align_pictures(tiles, groups, splits, vendors.held_out).items()}
    files |= {f"align/speech_{k}": sets.speech_records(v, split_of_name, f"speech_{k}") for k, v in clips.items()}
    files |= {
        "align/hear_train": sets.speech_records(hear_train, split_of_name, "hear_train"),
        "align/regions_train": sets.region_records(scenes["train"], "regions_train", seen),
        "align/regions_val": sets.region_records(scenes["val"], "regions_val", seen),
        "align/regions_new_vendor": sets.region_records(scenes["val_new_vendor"], "regions_new_vendor", new),
        "pretrain/train": sets.shuffled(pretrain, seed),
        "tune/scenes": sets.shuffled(
            sets.scene_conversations(scenes["train"], labels, related, seed, size.balanced), seed
        ),
        "tune/interleaved": sets.shuffled(several, seed),
        "tune/sounds": sets.shuffled(sets.hearing_conversations(hear_train, hear_names, seed), seed),
        "eval/scenes_seen": sets.region_records(scenes["eval_seen"], "scenes_seen", seen),
        "eval/scenes_new_vendor": sets.region_records(scenes["eval_new_vendor"], "scenes_new_vendor", new),
        "eval/interleaved_seen": sets.interleaved_conversations(
            scenes["interleaved"], size.interleaved_eval, labels, seed, "interleaved_seen", True
        ),
        "eval/hear": sets.hearing_eval(hear_test, hear_names, seed),
    }
    counts = {f"{name}.jsonl": sets.write_jsonl(folder / f"{name}.jsonl", records) for name, records in files.items()}
    used = {t.id: splits[t.id] for t in tiles}
    manifest = {"sha256": checksum(used), "splits": dict(sorted(used.items()))}
    (folder / "splits.json").write_text(json.dumps(manifest, indent=0) + "\n", encoding="utf-8")
    concepts = {
        "vocabulary": [asdict(c) for c in vocabulary],
        "subgroups": sorted({t.subgroup for t in tiles if t.vendor != "stamps"}),
        "hear_names": hear_names,
    }
    (folder / "concepts.json").write_text(json.dumps(concepts, indent=1) + "\n", encoding="utf-8")
    return counts


def manifest_path(recipe: Recipe, recipe_file: Path) -> Path | None:
    """The frozen split manifest beside the recipe, or among the packaged recipes."""
    if not recipe.splits:
        return None
    beside = recipe_file.parent / recipe.splits
    return beside if beside.is_file() else RECIPES / recipe.splits if (RECIPES / recipe.splits).is_file() else None


def _fill(
    recipe: Recipe, size: Size, report: FetchReport, manifest: Path | None, folder: Path, workers: Workers
) -> dict[str, Any]:
    """All stages into ``folder``; returns what dataset.json says about them."""
    start = time.monotonic()

    def step(text: str) -> None:
        say(f"[{time.monotonic() - start:5.1f} s] {text}")

    vendors = choose_vendors(recipe, report.paths)
    art = read_art(report.paths, vendors)
    groups = concept_groups(art)
    splits = assign_splits(art, groups, read_manifest(manifest) if manifest else None)
    drawings = 2 if len({a.vendor for a in art} & set(vendors.train)) > 2 else 1  # from pip alone there is one each
    vocabulary = scene_vocabulary(
        art, groups, splits, recipe.vocabulary, vendors.held_out, size.concepts, drawings, recipe.exclude_stamps
    )
    if len(vocabulary) < 4:
        raise UserError("fewer than four concepts can be drawn", do="check the recipe's vocabulary and vendors")
    art = pick_art(art, groups, vocabulary, size.align_pictures)
    step(f"{len(art)} drawings of {len({groups[a.id] for a in art})} concepts, {len(vocabulary)} of them on scenes")
    tiles, problems = build_tiles(art, folder, workers)
    step(f"{len(tiles)} tiles drawn, {len(problems)} left out")
    photos = sorted(p for p in report.paths["wallpapers"].rglob("*.jpg")) if "wallpapers" in report.paths else []
    scenes = build_scenes(recipe, size, vocabulary, tiles, photos, folder, workers)
    step(f"{sum(map(len, scenes.values()))} scenes composed")
    recordings = stamps.read_recordings(report.paths["stamps"]) if "stamps" in report.paths else []
    with_pico = "pico" in report.paths
    clips, hear_names = build_speech(recipe, size, tiles, vocabulary, recordings, folder, workers, with_pico)
    step(f"{sum(map(len, clips.values()))} clips spoken")
    counts = write_records(
        recipe, size, folder, vendors, tiles, groups, splits, vocabulary, scenes, clips, hear_names
    )  # fmt: skip
    step(f"{sum(counts.values())} records written")
    used = {t.id: splits[t.id] for t in tiles}
    return {"splits_sha256": checksum(used), "counts": counts, "left_out": problems, "vendors": vendors.model_dump()}


def build_dataset(
    recipe_path: str | Path, size: str = "full", out: Path | None = None, offline: bool = False, workers: int = 2,
    force: bool = False,
) -> Path:  # fmt: skip
    """Builds a dataset folder, or returns the one that is there when nothing of it would change.

    The folder appears under its name only when it is whole.

    Args:
        size: one of the recipe's sizes.
        out: default ``<cache>/datasets/<recipe name>-<size>``.
        offline: use cached sources only.
        workers: processes.
        force: build again even if nothing changed.

    Raises:
        UserError: recipe, sources, disk space, or a folder in the way that is no dataset.
    """
    data = load_recipe(recipe_path)
    recipe = parse_recipe(data, recipe_path)
    amount = recipe.size(size)
    wanted = [n for n, s in sources_of(data).items() if s.role == "data"]
    report = fetch_sources(data, offline=offline, only=wanted)
    target = (out or cache_root() / "datasets" / f"{recipe.name}-{size}").absolute()
    if target.exists() and not (target / "dataset.json").is_file() and (not target.is_dir() or any(target.iterdir())):
        raise UserError("is there and is no dataset", target, "give another --out")
    manifest = manifest_path(recipe, find_config(recipe_path, RECIPES))
    digest = recipe_hash(recipe, size, report.used, manifest)
    with locked(f"dataset-{hashlib.sha256(str(target).encode()).hexdigest()[:12]}"):
        if not force and (target / "dataset.json").is_file():
            if json.loads((target / "dataset.json").read_text(encoding="utf-8")).get("recipe_hash") == digest:
                say(f"{target} is up to date")
                return target
        part = target.with_name(target.name + PART)
        shutil.rmtree(part, ignore_errors=True)
        require_space(900_000_000 if amount.train_scenes > 1000 else 150_000_000, target.parent)
        try:
            part.mkdir(parents=True)
            made = _fill(recipe, amount, report, manifest, part, Workers(max(1, workers)))
            about = {"name": recipe.name, "size": size, "recipe_hash": digest, "seed": recipe.seed}
            about |= {"sources": report.used, "missing": report.missing, **made}
            (part / "dataset.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        except BaseException as e:
            shutil.rmtree(part, ignore_errors=True)
            if isinstance(e, OSError):
                raise UserError(f"cannot write the dataset ({e.strerror or e})", target) from None
            raise
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        part.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    return target
