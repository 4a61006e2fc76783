"""What is compared, what may be chosen on dev, and the rules of decision: all written down before any result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["baseline", "control", "method"]

# Settings that may be chosen, on dev pictures alone, by the AUC of POPE-adversarial; 0 for beta is no mask.
ALPHAS = (0.25, 0.5, 1.0, 2.0, 3.0)
BETAS = (0.0, 0.1, 0.3)
# The manipulation check: greedy says yes to an absent B this much more often beside its A than elsewhere.
BIAS = 0.10
# How much recall a method may lose and still count as reducing hallucination.
RECALL_LOSS = 0.02
SEEDS_FOR_CLAIM = 3
BASE = "greedy"
# What a method at T = 1 must beat, all three, before drawn answers are said to be better for it.
DRAWN = ("sample", "mask alone", "sample at T=1/4")


@dataclass(frozen=True)
class Condition:
    """One way of decoding.

    Attributes:
        spec: of the decoder.
        note: what a reader should know of it.
        tuned: alpha and beta are also chosen on dev; the chosen setting is one of the confirmatory comparisons.
        captions: also writes captions.
        alone: (spec, x, y) where the second view alone has the margin x times greedy's plus y times the spec's.
    """

    name: str
    spec: str
    kind: Kind
    note: str = ""
    tuned: bool = False
    captions: bool = False
    alone: tuple[str, float, float] | None = None


def minus(spec: str) -> tuple[str, float, float]:
    """``alone`` of a method whose score at alpha 1 is 2 z_0 - z_1."""
    return with_settings(spec, alpha=1, beta=0), 2.0, -1.0


def plus(spec: str) -> tuple[str, float, float]:
    """``alone`` of a method whose score at alpha 1 is z_0 + z_1."""
    return with_settings(spec, alpha=1, beta=0), -1.0, 1.0


def with_settings(spec: str, **settings: float) -> str:
    """The spec's string form with some parameters set anew: ("vcd:step=900", alpha=2) -> "vcd:step=900,alpha=2"."""
    name, _, rest = spec.partition(":")
    held = dict(item.split("=", 1) for item in rest.split(",") if item)
    held |= {key: f"{value:g}" for key, value in settings.items()}
    return f"{name}:{','.join(f'{k}={v}' for k, v in held.items())}"


CONDITIONS: tuple[Condition, ...] = (
    Condition(BASE, "greedy", "baseline", "the best token", captions=True),
    Condition("sample", "sample", "baseline", "sampling at T = 1, what most papers compare with", captions=True),
    Condition("sample at T=1/4", "sample:temperature=0.25", "control", "sharper sampling, one view", captions=True),
    Condition("mask alone", "vcd:alpha=0,beta=0.1,temperature=1", "control", "sampling within the plausibility mask",
              captions=True),
    Condition("identical view", "ritual:transform=identity,normalize=true,beta=0", "control", "must equal greedy"),
    Condition("vcd, step 500", "vcd:step=500", "method", "the authors' noise", tuned=True, captions=True,
              alone=minus("vcd:step=500")),
    Condition("vcd, step 900", "vcd:step=900", "method", "noise that leaves little", tuned=True,
              alone=minus("vcd:step=900")),
    Condition("vcd, sampled", "vcd:step=500,temperature=1", "method", "as in its paper", captions=True),
    Condition("ritual, gain 4", "ritual:transform=hflip", "method", "not normalised: four times as sharp"),
    Condition("ritual, normalised", "ritual:transform=hflip,normalize=true", "method", "gain 1", tuned=True,
              captions=True, alone=plus("ritual:transform=hflip")),
)  # fmt: skip

RULES = (
    "Primary endpoint: the area under the curve (AUC) of the yes-no margin on POPE-adversarial questions about twins, "
    "scenes that all show an A and, by the toss of a coin, its B. A leaning to yes or no cannot change it.",
    "Confirmatory comparisons: each method, with alpha and beta chosen on dev pictures, against greedy at T = 0, once "
    "on the test pictures; p values by the cluster bootstrap over pictures (and training seeds), Holm-adjusted over "
    "them. Everything else is exploratory.",
    "'Reduces hallucination' is said only if the difference in AUC is above 0 with an interval that leaves 0 out and "
    "an adjusted p of at most 0.05, more twins are answered right on both sides, and neither recall of present things "
    f"nor recall of captions falls by more than {100 * RECALL_LOSS:.0f} points, over at least {SEEDS_FOR_CLAIM} "
    "training seeds.",
    "'Reduces hallucination of sampled text' is said only against sampling at T = 1 and only where the method at T = 1 "
    "also beats the plausibility mask alone and sampling at T = 1/4.",
    f"Nothing is said at all if the bias did not take: greedy must answer yes to an absent B more than "
    f"{100 * BIAS:.0f} points more often beside its A than in a picture without that A.",
)


def grid(condition: Condition) -> list[str]:
    """The specs to try on dev for a condition with ``tuned``."""
    return [with_settings(condition.spec, alpha=a, beta=b) for a in ALPHAS for b in BETAS]


def chosen_name(condition: Condition) -> str:
    """How the setting chosen on dev is called."""
    return f"{condition.name} (dev)"


def confirmatory(conditions: Sequence[Condition] = CONDITIONS) -> list[Condition]:
    """The conditions whose dev-chosen settings are tested."""
    return [c for c in conditions if c.tuned]
