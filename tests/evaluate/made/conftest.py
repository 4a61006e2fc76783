"""A small dataset of own content in the layout of ``mmllm data build``, and the benchmarks made from it."""

import json
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mmllm.evaluate.benchmarks import get_benchmark
from mmllm.evaluate.benchmarks.base import Answered
from mmllm.evaluate.made.make import make_benchmarks

NAMES = ["cat", "dog", "owl", "bell", "lamp", "grapes", "boat", "tree"]
SCENES, VOICES = 12, ("f4", "m2")


def scene(folder, index):
    """One to three things on a grid; the first scenes hold pairs of cat and dog."""
    rng = np.random.default_rng(index)
    names = ["cat", "dog"] if index < 3 else [str(x) for x in rng.choice(NAMES, 1 + index % 3, replace=False)]
    boxes = []
    for place, name in enumerate(names):
        x, y = 0.02 + 0.33 * place, float(rng.uniform(0, 0.7))
        boxes.append({"xyxy": [round(x, 5), round(y, 5), round(x + 0.28, 5), round(y + 0.25, 5)], "text": name})
    file = f"{index}.jpg"
    Image.new("RGB", (32, 24), tuple(int(c) for c in rng.integers(0, 255, 3))).save(folder / "scenes" / file)
    return {"id": f"s{index}", "image": f"../scenes/{file}", "boxes": boxes}


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def tile(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGBA", (128, 128), (255, 255, 255, 0))
    rng = np.random.default_rng(zlib.crc32(path.name.encode()))
    ImageDraw.Draw(picture).ellipse((20, 4, 100, 124), fill=(*(int(c) for c in rng.integers(0, 255, 3)), 255))
    picture.save(path)


@pytest.fixture(scope="session")
def made_from(tmp_path_factory):
    """Folder of the small dataset."""
    import soundfile

    root = tmp_path_factory.mktemp("dataset")
    (root / "scenes").mkdir()
    (root / "dataset.json").write_text(json.dumps({"recipe_hash": "abc", "sources": []}))
    lines(root / "eval" / "scenes_seen.jsonl", [scene(root, i) for i in range(SCENES)])
    lines(root / "align" / "regions_train.jsonl", [scene(root, 100 + i) for i in range(20)])
    vocabulary = [{"label": x, "block": "things", "seen": [f"v/{x}"], "new": []} for x in NAMES]
    (root / "concepts.json").write_text(json.dumps({"vocabulary": vocabulary}))
    for name in NAMES:
        tile(root / "tiles" / "v" / f"{name}.png")
    (root / "audio").mkdir()
    heard = []
    for voice in VOICES:
        for name in NAMES[:4]:
            wave = np.sin(np.arange(1600) / (3 + len(heard))).astype(np.float32)
            soundfile.write(root / "audio" / f"{name}{voice}.wav", wave, 16000)
            heard.append({"id": f"{name}{voice}", "audio": f"../audio/{name}{voice}.wav", "label": name})
    lines(root / "eval" / "hear.jsonl", heard)
    return root


@pytest.fixture(scope="session")
def made(made_from, tmp_path_factory):
    """Folder with all benchmarks."""
    return make_benchmarks(str(made_from), tmp_path_factory.mktemp("made") / "bench")


@pytest.fixture
def ask():
    """(benchmark, data, sample -> text, style, folder) -> figures by name, rows."""

    def run(name, data, answer, style=None, scratch=None):
        bench = get_benchmark(name)(data, style, 0, scratch)
        rows = []
        for sample in bench.samples():
            row = Answered(sample, answer(sample))
            row.parsed = bench.parse(row.answer, sample)
            bench.judge(row)
            rows.append(row)
        return SimpleNamespace(figures={f.name: f.value for f in bench.aggregate(rows)}, rows=rows, bench=bench)

    return run
