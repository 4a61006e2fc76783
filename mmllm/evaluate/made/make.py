"""`mmllm data bench`: writes benchmarks with exact truth, in the official layouts, from a dataset's held-out part."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from mmllm.data.cache import cache_root
from mmllm.data.models import resolve_dataset
from mmllm.errors import UserError, unknown
from mmllm.evaluate.made.choices import write_mmbench, write_seed
from mmllm.evaluate.made.coco import write_coco, write_refcoco
from mmllm.evaluate.made.material import Material, write_json
from mmllm.evaluate.made.pairs import write_mmvp
from mmllm.evaluate.made.sounds import write_clotho, write_esc50
from mmllm.evaluate.made.yes_no import write_amber, write_mme, write_pope

VERSION = 1  # raise it when a writer changes what it writes
ABOUT = "bench.json"
# Name of the benchmark that reads it -> writer. CHAIR and the captions share COCO's files.
MAKERS: dict[str, Callable[[Material, Path], int]] = {
    "pope": write_pope, "chair": write_coco, "coco_captions": write_coco, "mme": write_mme, "mmvp": write_mmvp,
    "amber": write_amber, "refcoco": write_refcoco, "mmbench": write_mmbench, "seed": write_seed,
    "esc50": write_esc50, "clotho": write_clotho,
}  # fmt: skip
SOUNDS = ("esc50", "clotho")


def make_benchmarks(
    dataset: str, out: str | Path, only: Sequence[str] = (), split: str = "seen", limit: int | None = None,
    seed: int = 0, force: bool = False,
) -> Path:  # fmt: skip
    """Writes the benchmarks, or leaves the folder as it is when it already holds just these.

    The folder appears under its name only when it is whole; the same settings give the same bytes.

    Args:
        dataset: folder of ``mmllm data build``, ``starter:full`` or ``starter:fast``.
        only: names from ``MAKERS``; default, all that the dataset allows.
        split: ``seen`` or ``new_vendor``.
        limit: most scenes, sounds and pairs.

    Raises:
        UserError: unknown benchmark or split, no such dataset, no sounds in it, or a folder that holds other things.
    """
    for name in only:
        if name not in MAKERS:
            raise unknown("benchmark", name, MAKERS, "--tasks")
    root, target = resolve_dataset(dataset), Path(out).absolute()
    material = Material(root, split, limit, seed)
    if not material.sounds and set(only) & set(SOUNDS):
        raise UserError("this dataset has no sounds", root, f"leave out {', '.join(SOUNDS)}")
    names = [n for n in MAKERS if (n in only or not only) and (material.sounds or n not in SOUNDS)]
    about = {"version": VERSION, "dataset": material.manifest.get("recipe_hash") or str(root), "split": split,
             "limit": limit, "seed": seed, "benchmarks": names}  # fmt: skip
    if target.exists():
        if not target.is_dir() or (any(target.iterdir()) and not (target / ABOUT).is_file()):
            raise UserError("is there and holds no benchmarks made here", target, "give another --out")
        if not force and _held(target) == about:
            return target
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        items = {name: MAKERS[name](material, part) for name in names}
        write_json(part / ABOUT, {**about, "source": str(dataset), "items": items})
    except BaseException as e:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(e, OSError):
            raise UserError(f"cannot write the benchmarks ({e.strerror or e})", target) from None
        raise
    if target.exists():
        shutil.rmtree(target)
    part.rename(target)
    return target


def _held(folder: Path) -> dict:
    """What a folder was made with, without the counts."""
    try:
        held = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return {k: v for k, v in held.items() if k not in ("items", "source")}


def items_of(folder: Path) -> dict[str, int]:
    """Benchmark -> number of questions (pictures for CHAIR and captions) of a folder made here."""
    return json.loads((folder / ABOUT).read_text(encoding="utf-8"))["items"]


def cached_benchmarks(dataset: str) -> Path:
    """All benchmarks of a dataset, made on first use and kept in the cache."""
    import hashlib

    root = resolve_dataset(dataset)
    name = f"{root.name}-{hashlib.sha256(str(root).encode()).hexdigest()[:8]}"
    folder = cache_root() / "bench" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    return make_benchmarks(dataset, folder)
