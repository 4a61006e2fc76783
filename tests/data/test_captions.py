"""Captions: every form of text, and the four choices among them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mmllm.data.captions import CaptionSampler, captions_of
from mmllm.errors import UserError


def test_every_form_of_text():
    assert captions_of({"text": "a"}) == [(None, "a")] == captions_of({"label": "a"})
    assert captions_of({"text": ["a", "b"]}) == [(None, "a"), (None, "b")]
    both = {"text": {"en": ["a", "b"], "fr": "c"}}
    assert captions_of(both) == [("en", "a"), ("en", "b"), ("fr", "c")]
    assert captions_of(both, ["fr", "de"]) == [("fr", "c")] and captions_of({"image": "x"}) == []


HELD = [["a0", "a1", "a2"], ["b0"], ["c0", "c1"]]


def test_first_and_all():
    rng = np.random.default_rng(0)
    assert CaptionSampler("first").pick(HELD, [2, 0], 7, rng) == (["c0", "a0"], [0, 1])
    picked, owner = CaptionSampler("all").pick(HELD, [2, 0, 1], 0, rng)
    assert picked == ["c0", "c1", "a0", "a1", "a2", "b0"] and owner == [0, 0, 1, 1, 1, 2]


def test_round_robin_uses_each_caption_equally_often():
    sampler = CaptionSampler("round_robin")
    used = [sampler.pick(HELD, [0, 1, 2], p, np.random.default_rng(0))[0] for p in range(6)]
    assert Counter(t for u in used for t in u) == {"a0": 2, "a1": 2, "a2": 2, "b0": 6, "c0": 3, "c1": 3}


def test_random_is_even_and_repeats():
    draw = lambda seed: CaptionSampler().pick(HELD, [0] * 3000, 0, np.random.default_rng(seed))[0]  # noqa: E731
    assert draw(1) == draw(1) != draw(2)
    assert all(abs(n - 1000) < 100 for n in Counter(draw(1)).values())
    with pytest.raises(UserError, match="did you mean 'round_robin'"):
        CaptionSampler("round-robin")  # type: ignore[arg-type]
