"""Two recordings as one sound."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile

from mmllm.data.media import load_audio
from mmllm.data.sound_pairs import KINDS, SoundPairs
from mmllm.errors import UserError


@pytest.fixture
def records(tmp_path):
    out = []
    for n, name in enumerate(("cat", "dog", "owl")):
        wave = np.full(1000 * (n + 1), 0.1 * (n + 1), np.float32)
        soundfile.write(tmp_path / f"{name}.wav", wave, 16000, subtype="FLOAT")
        out.append({"id": name, "audio": str(tmp_path / f"{name}.wav"), "text": [name]})
    return out


def test_each_pair_comes_in_all_kinds_and_sounds_as_its_text_says(records):
    made = list(SoundPairs(list(KINDS), count=4, gap=0.05, seed=3).apply(iter(records)))
    assert len(made) == 20 and [r["meta"]["kind"] for r in made[:5]] == list(KINDS)
    waves = {r["id"]: load_audio(r["audio"]) for r in records}
    for number in range(4):
        kinds = {r["meta"]["kind"]: r for r in made if r["group"] == f"pair-{number}"}
        a, b = kinds["forward"]["meta"]["first"], kinds["forward"]["meta"]["second"]
        x, y, gap = waves[a], waves[b], np.zeros(800, np.float32)
        heard = {k: load_audio(r["audio"]) for k, r in kinds.items()}
        close = {"rtol": 0, "atol": 1e-4}  # 16 bits
        np.testing.assert_allclose(heard["single"], x, **close)
        np.testing.assert_allclose(heard["forward"], np.concatenate([x, gap, y]), **close)
        np.testing.assert_allclose(heard["reversed"], np.concatenate([y, gap, x]), **close)
        np.testing.assert_allclose(heard["both"], heard["forward"])
        both = np.zeros(max(len(x), len(y)))
        both[: len(x)] += x / 2
        both[: len(y)] += y / 2
        np.testing.assert_allclose(heard["overlay"], both, **close)
        assert kinds["forward"]["text"] == [f"{a} before {b}", f"{b} after {a}"]
        assert kinds["reversed"]["text"] == [f"{b} before {a}", f"{a} after {b}"]
        assert kinds["forward"]["label"] == f"{a}, {b}" and kinds["reversed"]["label"] == f"{b}, {a}"
        assert len({r["audio"].stamp() for r in kinds.values()}) == 4  # "both" sounds as "forward" does


def test_draws_are_repeatable_and_mistakes_named(records):
    names = [[r["label"] for r in SoundPairs(count=6, names=2, seed=s).apply(iter(records))] for s in (0, 0, 1)]
    assert names[0] == names[1] != names[2] and set(names[0]) == {"cat, dog", "dog, cat"}
    named = list(SoundPairs(count=8, names=["owl", "dog", "fox"]).apply(iter(records)))
    assert {r["meta"]["first"] for r in named} == {"owl", "dog"}
    with pytest.raises(UserError, match="did you mean 'reversed'"):
        SoundPairs(["reverse"])
    with pytest.raises(UserError, match="two different names"):
        list(SoundPairs().apply(iter(records[:1])))
