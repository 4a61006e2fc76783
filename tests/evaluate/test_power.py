"""Sample sizes of McNemar's test against the planning table and the exact test's own power."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from mmllm.evaluate.paired import mcnemar_exact
from mmllm.evaluate.power import detectable_gain, mcnemar_power, mcnemar_sample_size

TABLE = [(0.10, 0.02, 1960), (0.10, 0.03, 870), (0.15, 0.03, 1306), (0.15, 0.05, 470), (0.20, 0.05, 626)]


@pytest.mark.parametrize("discordance, gain, items", TABLE)
def test_planning_table_and_its_inverses(discordance, gain, items):
    n = mcnemar_sample_size(discordance, gain)
    assert n == pytest.approx(items, abs=1)
    assert mcnemar_power(n, discordance, gain) >= 0.8 > mcnemar_power(n - 1, discordance, gain)
    assert detectable_gain(n, discordance) == pytest.approx(gain, rel=2e-3)
    assert mcnemar_sample_size(discordance, -gain) == n


def exact_power(n, discordance, gain):
    """Chance that the exact test says p <= 0.05, summed over every table."""
    total = 0.0
    for m in range(n + 1):
        weight = binom.pmf(m, n, discordance)
        if weight > 1e-9:
            b = np.arange(m + 1)
            rejects = [mcnemar_exact(int(x), m - int(x)) <= 0.05 for x in b]
            total += weight * binom.pmf(b, m, (discordance + gain) / (2 * discordance))[rejects].sum()
    return total


@pytest.mark.parametrize("n, discordance, gain", [(500, 0.1, 0.02), (1000, 0.1, 0.02), (626, 0.2, 0.05)])
def test_power_is_a_few_points_above_that_of_the_exact_test(n, discordance, gain):
    assert 0 < mcnemar_power(n, discordance, gain) - exact_power(n, discordance, gain) < 0.05


def test_design_effect_stretches_the_sample():
    assert mcnemar_sample_size(0.1, 0.02, design_effect=1.5) == pytest.approx(1.5 * 1960, abs=1)
    assert mcnemar_power(3000, 0.1, 0.02, design_effect=1.5) == pytest.approx(mcnemar_power(2000, 0.1, 0.02))
    assert detectable_gain(3000, 0.1, design_effect=1.5) == pytest.approx(detectable_gain(2000, 0.1))


def test_other_levels_of_power_and_alpha_are_inverted_too():
    for power, alpha in ((0.9, 0.05), (0.5, 0.05), (0.8, 0.01), (0.3, 0.1)):
        gain = detectable_gain(400, 0.2, power, alpha)
        assert mcnemar_power(400, 0.2, gain, alpha) == pytest.approx(power)


def test_designs_that_cannot_be():
    with pytest.raises(ValueError, match="discordance"):
        mcnemar_power(100, 0.1, 0.2)
    with pytest.raises(ValueError, match="discordance"):
        detectable_gain(100, 1.0)
    with pytest.raises(ValueError, match="gain of 0"):
        mcnemar_sample_size(0.1, 0)
    # Twenty items with 2 discordant ones among them can show nothing.
    assert math.isnan(detectable_gain(20, 0.1)) and math.isnan(detectable_gain(1, 0.5))
