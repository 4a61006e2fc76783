"""ESC-50-like and Clotho-like files from the dataset's spoken names in voices that training never heard."""

from __future__ import annotations

import csv
from pathlib import Path

from mmllm.data.questions import with_article
from mmllm.evaluate.made.material import Material, copy

CLASSES, FOLDS = 50, 5


def write_esc50(m: Material, out: Path) -> int:
    """``ESC-50/``: meta/esc50.csv and the clips; at most fifty names, each voice's clip a recording of its own."""
    names = list(dict.fromkeys(r["label"] for r in m.sounds))[:CLASSES]
    rows, taken = [], dict.fromkeys(names, 0)
    for r in m.sounds:
        if r["label"] not in taken:
            continue
        target, take = names.index(r["label"]), taken[r["label"]]
        taken[r["label"]] += 1
        fold = 1 + (target + take) % FOLDS
        name = f"{fold}-{100000 + len(rows)}-{chr(ord('A') + take % 26)}-{target}.wav"
        copy(Path(r["audio"]), out / "ESC-50" / "audio" / name)
        rows.append([name, fold, target, r["label"].replace(" ", "_"), False, 100000 + len(rows), "A"])
    path = out / "ESC-50" / "meta" / "esc50.csv"
    _table(path, ["filename", "fold", "target", "category", "esc10", "src_file", "take"], rows)
    return len(rows)


def heard(label: str) -> list[str]:
    """Five captions of a spoken name."""
    thing = with_article(label)
    return [f"A voice says the word {label}.", f"Someone speaks of {thing}.", f"The spoken word {label}.",
            f"A person says {label}.", f"{label}, said by a voice."]  # fmt: skip


def write_clotho(m: Material, out: Path) -> int:
    """``Clotho/``: clotho_captions_evaluation.csv and evaluation/; the first clip of each name."""
    first = {r["label"]: r for r in reversed(m.sounds)}
    rows = []
    for label in dict.fromkeys(r["label"] for r in m.sounds):
        source = Path(first[label]["audio"])
        name = f"{label.replace(' ', '_')}.wav"
        copy(source, out / "Clotho" / "evaluation" / name)
        rows.append([name, *heard(label)])
    path = out / "Clotho" / "clotho_captions_evaluation.csv"
    _table(path, ["file_name", *(f"caption_{k}" for k in range(1, 6))], rows)
    return len(rows)


def _table(path: Path, head: list[str], rows: list[list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as f:
        csv.writer(f, lineterminator="\n").writerows([head, *rows])
