"""What is compared, what may be chosen on dev, and the rules of decision: all written down before any result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
        spec: of the decoder, at the settings of the method's authors.
        note: what a reader should know of it.
        tuned: template with ``{alpha}`` and ``{beta}``, which are chosen on dev; the chosen setting is one of the
            confirmatory comparisons.
        alone: (spec, x, y) where the second view alone has the margin x times greedy's plus y times the spec's.
        captions: also writes captions.
        full: only in the full size.
    """

    name: str
    spec: str
    kind: Kind
    note: str = ""
    tuned: str = ""
    alone: tuple[str, float, float] | None = None
    captions: bool = False
    full: bool = False


def contrast(name: str, method: str, note: str, settings: str = "", captions: bool = False) -> Condition:
    """A method with the score (1 + alpha) z_0 - alpha z_1, alpha and beta chosen on dev."""
    extra = f"{settings}," if settings else ""
    template = f"{method}:{extra}alpha={{alpha}},beta={{beta}}"
    alone = (template.format(alpha=1, beta=0), 2.0, -1.0)
    return Condition(name, f"{method}:{settings}".rstrip(":"), "method", note, template, alone, captions)


FLIP = "ritual:transform=hflip"
CONDITIONS: tuple[Condition, ...] = (
    Condition(BASE, "greedy", "baseline", "the best token", captions=True),
    Condition("sample", "sample", "baseline", "T = 1, what most papers compare with", captions=True),
    Condition("sample at T=1/4", "sample:temperature=0.25", "control", "sharper, one view", captions=True),
    Condition("mask alone", "apc:beta=0.1,temperature=1", "control", "T = 1, plausible tokens only", captions=True),
    Condition("identical view", "contrast:view=identity,beta=0", "control", "must equal greedy"),
    contrast("vcd, step 500", "vcd", "the authors' noise", "step=500", captions=True),
    contrast("vcd, step 900", "vcd", "noise that leaves little of the picture", "step=900"),
    contrast("blank", "blank", "one even colour"),
    contrast("no image", "no_image", "the text alone", captions=True),
    contrast("patch shuffle", "patch_shuffle", "tiles in random order"),
    contrast("icd", "icd", "a disturbing system prompt"),
    Condition("ritual", FLIP + ",normalize=true", "method", "mirrored, divided by its gain",
              FLIP + ",normalize=true,alpha={alpha},beta={beta}", (FLIP + ",alpha=1,beta=0", -1.0, 1.0), captions=True),
    Condition("vcd + ritual", f"vcd:step=500+{FLIP},normalize=true", "method", "three views",
              "vcd:step=500,alpha={alpha},beta={beta}+" + FLIP + ",normalize=true,beta={beta}"),
    Condition("ritual, gain 4", FLIP, "method", "not divided: four times as sharp"),
    Condition("vcd, sampled", "vcd:step=500,temperature=1", "method", "as in its paper", captions=True),
    Condition("m3id", "m3id", "method", "grows with the length: next to nothing on one word", captions=True),
    Condition("dola", "dola", "method", "an early layer"),
    Condition("deco", "deco", "method", "an early layer"),
    replace(contrast("vcd, step 300", "vcd", "little noise", "step=300"), tuned="", full=True),
    replace(contrast("vcd, step 700", "vcd", "more noise", "step=700"), tuned="", full=True),
    Condition("avisc", "avisc", "method", "over-attended parts alone", full=True),
    Condition("sid", "sid", "method", "least attended parts alone", full=True),
    Condition("pai", "pai", "method", "attention on the picture boosted", full=True),
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
    return [condition.tuned.format(alpha=f"{a:g}", beta=f"{b:g}") for a in ALPHAS for b in BETAS]


def conditions_of(full: bool) -> list[Condition]:
    """The conditions of a size."""
    return [c for c in CONDITIONS if full or not c.full]


def chosen_name(condition: Condition) -> str:
    """How the setting chosen on dev is called."""
    return f"{condition.name} (dev)"


def confirmatory(conditions: Sequence[Condition] = CONDITIONS) -> list[Condition]:
    """The conditions whose dev-chosen settings are tested."""
    return [c for c in conditions if c.tuned]
