"""How many paired items does a gain in accuracy need to be noticed? McNemar power, sample size and detectable gain."""

from __future__ import annotations

import math

from scipy.special import ndtr, ndtri

from mmllm.evaluate.paired import ALPHA


def _quantiles(power: float, alpha: float) -> tuple[float, float]:
    return float(ndtri(1 - alpha / 2)), float(ndtri(power))


def _check_design(discordance: float, gain: float = 0.0) -> None:
    if not (0 < discordance < 1 and abs(gain) <= discordance):
        raise ValueError(f"discordance {discordance} must lie between 0 and 1 and be at least the gain {gain}")


def mcnemar_power(n: float, discordance: float, gain: float, alpha: float = ALPHA, design_effect: float = 1.0) -> float:
    """Chance that McNemar's two-sided test on ``n`` items notices a true ``gain`` in accuracy.

    Normal approximation of Connor (1987, Biometrics 43): with d = discordance, g = gain,
    power = Phi((|g| sqrt(n) - z_{1-alpha/2} sqrt(d)) / sqrt(d - g^2)); the exact test has 2 to 4 points less with some
    50 to 200 discordant items.

    Args:
        discordance: share of items that exactly one side has right, as a fraction.
        gain: difference of the two accuracies, as a fraction.
        design_effect: 1 + (m - 1) rho for m questions per picture whose differences correlate with rho.

    Raises:
        ValueError: a discordance outside (0, 1) or below the gain.
    """
    _check_design(discordance, gain)
    z, _ = _quantiles(0.5, alpha)
    shift = abs(gain) * math.sqrt(n / design_effect) - z * math.sqrt(discordance)
    return float(ndtr(shift / math.sqrt(discordance - gain**2)))


def mcnemar_sample_size(
    discordance: float, gain: float, power: float = 0.8, alpha: float = ALPHA, design_effect: float = 1.0
) -> int:
    """Items needed to notice ``gain`` with ``power``: the inverse of :func:`mcnemar_power`, rounded up.

    n = design_effect (z_{1-alpha/2} sqrt(d) + z_power sqrt(d - g^2))^2 / g^2 (Connor 1987).

    Raises:
        ValueError: as :func:`mcnemar_power`, or a gain of 0.
    """
    _check_design(discordance, gain)
    if not gain:
        raise ValueError("no number of items notices a gain of 0")
    z, z_power = _quantiles(power, alpha)
    root = z * math.sqrt(discordance) + z_power * math.sqrt(discordance - gain**2)
    return math.ceil(design_effect * (root / gain) ** 2)


def detectable_gain(
    n: float, discordance: float, power: float = 0.8, alpha: float = ALPHA, design_effect: float = 1.0
) -> float:
    """The smallest gain that ``n`` items notice with ``power``; NaN where even gain = discordance is not noticed.

    :func:`mcnemar_power` solved for g: with m = n / design_effect,
    g = sqrt(d) (z sqrt(m) + z_power sqrt(m + z_power^2 - z^2)) / (m + z_power^2).
    """
    _check_design(discordance)
    z, z_power = _quantiles(power, alpha)
    m = n / design_effect
    if m + z_power**2 <= z**2:
        return math.nan
    gain = math.sqrt(discordance) * (z * math.sqrt(m) + z_power * math.sqrt(m + z_power**2 - z**2)) / (m + z_power**2)
    return gain if gain <= discordance else math.nan
