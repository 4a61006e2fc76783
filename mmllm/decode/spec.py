"""A decoding method as data: views of the prompt, how their logits are mixed, a plausibility mask, how to pick."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

Select = Literal["divergent", "likeliest", "mean"]


@dataclass(frozen=True)
class Op:
    """One named operation with its parameters; ``mmllm.decode.ops`` lists all of them and checks both.

    Attributes:
        name: such as ``diffuse`` or ``apc``.
        args: (parameter, value) pairs, all parameters present, in the order of the table.
    """

    name: str
    args: tuple[tuple[str, Any], ...] = ()

    def __getitem__(self, key: str) -> Any:
        return dict(self.args)[key]


@dataclass(frozen=True)
class View:
    """The prompt seen differently: changed media, changed words, or changed inside the model.

    Attributes:
        media: operations on pictures and sounds, applied in order.
        text: operations on the messages.
        model: operations on this row inside the LLM (attention, hidden states).
    """

    media: tuple[Op, ...] = ()
    text: tuple[Op, ...] = ()
    model: tuple[Op, ...] = ()


@dataclass(frozen=True)
class Tap:
    """Logits of the base row read off earlier layers.

    Attributes:
        layers: ``low`` or ``high`` (every second layer of that half), ``a:b`` or ``a,b,c``; whole numbers count
            layer outputs from 1, numbers below 1 are shares of the depth.
        select: which of them counts: ``divergent`` (farthest from the last layer, DoLa), ``likeliest`` (highest
            probability of a candidate token, DeCo) or ``mean`` (mean of the logits).
        norm: apply the final norm before the head.
    """

    layers: str
    select: Select = "divergent"
    norm: bool = True


@dataclass(frozen=True)
class Term:
    """One contribution to the mix, beside the base logits ``z_0``.

    Attributes:
        source: number of a view (1 is the first further view) or a tap; its logits are ``z``.
        kind: ``contrast`` adds ``weight * (z_0 - z)``, ``add`` adds ``weight * z``.
        weight: constant factor.
        rule: makes the factor depend on the step or the logits (``growth``, ``agreement``, ``probability``).
    """

    source: int | Tap
    kind: Literal["contrast", "add"]
    weight: float
    rule: Op | None = None


@dataclass(frozen=True)
class DecodeSpec:
    """``scores = z_0 + sum of terms``, divided by the gain if normalised, masked, then picked from.

    View 0 is the untouched prompt, and masks look at its logits alone, in float32, before temperature.

    Attributes:
        methods: (preset, its parameters that differ from the defaults); empty for a program given term by term.
        views: the further views.
        base: operations inside the model on view 0.
        terms: what is added to ``z_0``.
        masks: ``apc``, ``nucleus``, ``agreement``; a token must pass all of them.
        normalize: divide by the gain, so that agreeing views give the base logits.
        temperature: 0 takes the best token, above 0 samples; applied after mix and mask.
        top_k, top_p, min_p: cuts of the sampling distribution; 0, 1 and 0 switch them off.
    """

    methods: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = ()
    views: tuple[View, ...] = ()
    base: tuple[Op, ...] = ()
    terms: tuple[Term, ...] = ()
    masks: tuple[Op, ...] = ()
    normalize: bool = False
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def name(self) -> str:
        return "+".join(name for name, _ in self.methods) or "custom"

    @property
    def gain(self) -> float:
        """What the logits are multiplied by when all views agree: an inverse temperature (1 after ``normalize``).

        Factors of a rule count with their largest value, so for DeCo this is the upper end.
        """
        return 1.0 if self.normalize else self.raw_gain

    @property
    def raw_gain(self) -> float:
        """The gain before ``normalize``: 1 plus the weights of what is added; contrasts cancel."""
        return 1.0 + sum(t.weight for t in self.terms if t.kind == "add")

    @property
    def constant(self) -> bool:
        """True when the mix is the same weighted sum of views at every step and for every logits."""
        return all(t.rule is None and isinstance(t.source, int) for t in self.terms)

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of every view, view 0 first, of a constant mix, with ``normalize`` applied."""
        table = [1.0] + [0.0] * len(self.views)
        for term in self.terms:
            assert isinstance(term.source, int)
            if term.kind == "contrast":
                table[0] += term.weight
                table[term.source] -= term.weight
            else:
                table[term.source] += term.weight
        return tuple(w / self.raw_gain for w in table) if self.normalize else tuple(table)

    @property
    def taps(self) -> tuple[Tap, ...]:
        """The different taps of the terms."""
        return tuple(dict.fromkeys(t.source for t in self.terms if isinstance(t.source, Tap)))

    @property
    def do_sample(self) -> bool:
        return self.temperature > 0

    def __str__(self) -> str:
        from mmllm.decode.parse import to_string

        return to_string(self)

    def to_dict(self, expand: bool = False) -> dict[str, Any]:
        """The object form, which ``parse_spec`` reads back; ``expand`` writes the program instead of the presets."""
        from mmllm.decode.parse import to_object

        return to_object(self, expand)

    def to_yaml(self, expand: bool = False) -> str:
        """The YAML form, which ``parse_spec`` reads back from ``@FILE``."""
        import yaml

        return yaml.safe_dump(self.to_dict(expand), sort_keys=False, allow_unicode=True)


def without_idle(spec: DecodeSpec) -> DecodeSpec:
    """The same method without terms of weight 0 and without views that no term uses."""
    terms = [t for t in spec.terms if t.weight != 0]
    used = sorted({t.source for t in terms if isinstance(t.source, int)})
    number = {old: new for new, old in enumerate(used, 1)}
    masks = tuple(m for m in spec.masks if m.name != "agreement" or m["view"] in number)
    return replace(
        spec,
        views=tuple(spec.views[i - 1] for i in used),
        terms=tuple(_renumbered(t, number) for t in terms),
        masks=tuple(_renumbered_mask(m, number) for m in masks),
    )


def merge(specs: list[DecodeSpec]) -> DecodeSpec:
    """Methods joined by ``+``: their terms add up on one base row, equal views are computed once.

    Masks of the same kind keep the stricter one.
    """
    views: list[View] = []
    terms: list[Term] = []
    masks: dict[str, Op] = {}
    for spec in specs:
        number: dict[int, int] = {}
        for i, view in enumerate(spec.views, 1):
            if view not in views:
                views.append(view)
            number[i] = views.index(view) + 1
        terms += [_renumbered(t, number) for t in spec.terms]
        for mask in (_renumbered_mask(m, number) for m in spec.masks):
            held = masks.get(mask.name)
            masks[mask.name] = mask if held is None else _stricter(held, mask)
    return DecodeSpec(
        methods=tuple(m for spec in specs for m in spec.methods),
        views=tuple(views),
        base=tuple(dict.fromkeys(op for spec in specs for op in spec.base)),
        terms=tuple(terms),
        masks=tuple(masks.values()),
    )


def _renumbered(term: Term, number: dict[int, int]) -> Term:
    return replace(term, source=number[term.source]) if isinstance(term.source, int) else term


def _renumbered_mask(mask: Op, number: dict[int, int]) -> Op:
    return Op(mask.name, (("view", number[mask["view"]]),)) if mask.name == "agreement" else mask


def _stricter(a: Op, b: Op) -> Op:
    if a.name == "apc":
        return max(a, b, key=lambda m: m["beta"])
    if a.name == "nucleus":
        return Op("nucleus", (("top_k", min(a["top_k"], b["top_k"])), ("top_p", min(a["top_p"], b["top_p"]))))
    return a
