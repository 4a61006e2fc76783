"""Spearman's correlation against scipy's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from mmllm.evaluate.correlation import spearman


def test_it_is_scipys_with_ties():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, 40), rng.normal(size=40)
    assert spearman(x, y) == pytest.approx(spearmanr(x, y)[0])
    assert spearman(y, np.exp(y)) == pytest.approx(1) and spearman(y, -y) == pytest.approx(-1)
    assert math.isnan(spearman(np.ones(3), y[:3]))
