"""Small benchmarks of own content in the official layouts, and canned answers through the benchmark's own code."""

import json
import zlib

import numpy as np
import pytest
from PIL import Image

from mmllm.evaluate.benchmarks import get_benchmark
from mmllm.evaluate.benchmarks.base import Answered


def draw(path):
    """A small picture whose colours depend on its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(zlib.crc32(path.name.encode()))
    Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).save(path)
    return path


def play(path, seconds=0.2):
    """A short tone."""
    import soundfile

    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.sin(np.arange(int(16000 * seconds)) / 7).astype(np.float32), 16000)
    return path


def dump(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def dump_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def canned(name, data, answers, style=None, scratch=None, limit=None, control=None, scores=None):
    """Figures by name, the rows and the benchmark, of a benchmark whose samples got canned answers.

    ``answers``: sample -> text; ``control``: the same for samples with shuffled media; ``scores``: sample -> list.
    """
    bench = get_benchmark(name)(data, style, 0, scratch)
    samples = bench.samples(limit)
    rows = []
    for sample in samples + (bench.control(samples, 0) if control else []):
        answer = (control if sample.control else answers)(sample)
        row = Answered(sample, answer, scores(sample) if scores else None, prompt=bench.words(sample))
        row.parsed = bench.parse(answer, sample)
        bench.judge(row)
        rows.append(row)
    return {f.name: f for f in bench.aggregate(rows)}, rows, bench


@pytest.fixture
def make():
    """The makers of files, in one place."""
    return type("Make", (), {"draw": staticmethod(draw), "play": staticmethod(play), "dump": staticmethod(dump),
                             "dump_lines": staticmethod(dump_lines), "canned": staticmethod(canned)})  # fmt: skip
