"""Writes README's three pictures with what the quickstart's model said about them, between the marks that name the run.

    python scripts/readme_pictures.py [SEED]             (default: 0)

The pictures stand between `<!-- pictures: runs/quickstart -->` and `<!-- end pictures -->`. They are drawn at random,
with a fixed seed and as the report's gallery draws its own, from the scenes of the vendor that training never saw:
Fluent Emoji (MIT). Scenes in front of a wallpaper are left out, since those have other licences.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from mmllm.data.recipe import parse_recipe
from mmllm.data.sources import load_recipe
from mmllm.data.workers import SCENE_SETS
from mmllm.evaluate.gallery import gallery_items
from mmllm.report.html import Item

MARK = re.compile(r"(<!-- pictures: (\S+) -->\n).*?(<!-- end pictures -->)", re.DOTALL)
SET, FOLDER, COUNT = "eval_new_vendor", Path("docs/pictures"), 3


def painted(path: str, seed: int) -> bool:
    """Whether a scene's background is painted by our own code: a scene's first draw decides it (``Composer``)."""
    if Path(path).parent.name != SET:
        return False
    return np.random.default_rng((seed, SCENE_SETS[SET], int(Path(path).stem))).random() >= 1 / 3


def drawn(run: Path, seed: int) -> list[Item]:
    """The items of the gallery, of scenes that may be shown."""
    recipe_seed = parse_recipe(load_recipe("starter.yaml")).seed
    lines = (run / "eval" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [x for x in lines if all(painted(m, recipe_seed) for m in json.loads(x)["media"])]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "predictions.jsonl"
        file.write_text("\n".join(kept) + "\n", encoding="utf-8")
        return gallery_items(file, scenes=COUNT, sounds=0, seed=seed, questions=4)


def block(run: Path, seed: int) -> str:
    """A table with one column a picture; the pictures are copied to docs/pictures."""
    items = drawn(run, seed)
    FOLDER.mkdir(parents=True, exist_ok=True)
    heads, cells = [], []
    for number, item in enumerate(items, 1):
        target = FOLDER / f"quickstart-{number}.jpg"
        shutil.copyfile(item.media[0], target)
        heads.append(f"![a scene that the model has not seen]({target})")
        said = [f"{a.question} **{a.answer}** " + ("✓" if a.right else f"✗ ({a.truth})") for a in item.answered]
        cells.append("<br>".join(said))
    rows = [f"| {' | '.join(heads)} |", "|" + "---|" * len(items), f"| {' | '.join(cells)} |"]
    about = f"Drawn at random by `python scripts/readme_pictures.py {seed}`, failures included; art: Fluent Emoji, MIT."
    return "\n".join(rows) + f"\n\n{about}\n"


def main(seed: int) -> None:
    readme = Path("README.md")
    text = readme.read_text(encoding="utf-8")
    found = MARK.search(text)
    if found is None or not (Path(found[2]) / "eval" / "predictions.jsonl").is_file():
        sys.exit(f"error: README.md has no mark for pictures, or no run lies there; run make demo\n{MARK.pattern}")
    made = MARK.sub(lambda m: f"{m[1]}\n{block(Path(m[2]), seed)}\n{m[3]}", text)
    readme.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
