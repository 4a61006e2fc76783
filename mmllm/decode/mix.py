"""From the logits of all views and taps to one score vector, and from that to a token or a log-probability."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmllm.decode.spec import DecodeSpec, Op, Tap

# What a token outside the masks loses in ``log_probabilities``: finite, so that candidates that are both implausible
# keep their order, and margins (for an AUC) stay finite.
IMPLAUSIBLE = -1000.0
# Stands for -inf inside the weighted sum: a negative weight times -inf would turn a forbidden token into the best one.
_FLOOR = -1e4

Taps = dict[Tap, Tensor]  # logits [n, layers, V] of each tap's layers


def mix(logits: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the views' logits.

    Args:
        logits: [n, K, V]; view 0 is the untouched prompt.
        weights: [n, K]; views that a request does not have get weight 0.

    Returns:
        [n, V] float32; -inf where view 0 is -inf.
    """
    z = logits.float()
    if z.shape[1] == 1:
        return z[:, 0] * weights[:, :1]
    summed = torch.einsum("nk,nkv->nv", weights.float(), z.clamp(min=_FLOOR))
    return summed.masked_fill(z[:, 0] == -math.inf, -math.inf)


def plausible(base: Tensor, beta: Tensor) -> Tensor:
    """[n, V] bool: where ``base >= max(base) + log(beta)``; everywhere for beta 0. ``base`` [n, V], ``beta`` [n]."""
    base = base.float()
    cut = base.max(dim=-1, keepdim=True).values + beta.to(base).log()[:, None]
    return base >= cut


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """Bounded divergence of two logit vectors [n, V] -> [n] in 0..1: ``sum (p + q) / 2 * log2(|p - q|^0.2 + 1)``.

    CODE (arXiv 2406.01920); 0 for equal distributions, 1 for certain and different ones.
    """
    p, q = a.float().softmax(-1), b.float().softmax(-1)
    return (0.5 * (p + q) * torch.log2((p - q).abs() ** 0.2 + 1)).sum(-1)


def jensen_shannon(a: Tensor, b: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats of two logit tensors [..., V] -> [...]."""
    p, q = a.float().log_softmax(-1), b.float().log_softmax(-1)
    m = torch.logaddexp(p, q) - math.log(2)
    return 0.5 * ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1))


def scores(
    logits: Tensor, specs: Sequence[DecodeSpec], steps: Sequence[int] | None = None, taps: Sequence[Taps] | None = None
) -> Tensor:
    """Mixed and masked scores [n, V] of n requests.

    Args:
        logits: [n, K, V]; views that a request does not have may be anything finite.
        steps: tokens that each request has already; default none.
        taps: for each request, logits [layers, V] of its taps.
    """
    mixed, keep = combine(logits, specs, steps, taps)
    return mixed if keep is None else mixed.masked_fill(~keep, -math.inf)


def combine(
    logits: Tensor, specs: Sequence[DecodeSpec], steps: Sequence[int] | None = None, taps: Sequence[Taps] | None = None
) -> tuple[Tensor, Tensor | None]:
    """The mix [n, V] float32 before its masks, and the tokens that the masks keep [n, V], None when nothing is masked.

    Requests of one method are computed together; their results do not depend on each other.
    """
    groups: dict[DecodeSpec, list[int]] = {}
    for i, spec in enumerate(specs):
        groups.setdefault(spec, []).append(i)
    mixed = logits.new_empty(len(logits), logits.shape[-1], dtype=torch.float32)
    keep = None
    for spec, members in groups.items():
        whole = len(groups) == 1
        z = logits if whole else logits[members]
        t = torch.tensor([steps[i] if steps else 0 for i in members], device=logits.device)
        taken = {tap: torch.stack([taps[i][tap] for i in members]) for tap in spec.taps} if taps else {}
        part, kept = _combine_one(z.float(), spec, t, taken)
        if kept is not None and keep is None:
            keep = torch.ones_like(mixed, dtype=torch.bool)
        if whole:
            return part, kept
        mixed[members] = part
        if kept is not None and keep is not None:
            keep[members] = kept
    return mixed, keep


def _combine_one(z: Tensor, spec: DecodeSpec, t: Tensor, taps: Taps) -> tuple[Tensor, Tensor | None]:
    """The same for requests [n, K, V] of one method at steps ``t`` [n]."""
    base = z[:, 0]
    keep = _kept(z, spec)
    if spec.constant:
        return mix(z[:, : 1 + len(spec.views)], torch.tensor([spec.weights] * len(z), device=z.device)), keep
    floored = base.clamp(min=_FLOOR)
    total, gain = floored.clone(), torch.ones(len(z), 1, device=z.device)
    for term in spec.terms:
        if isinstance(term.source, Tap):
            other, peak = _tapped(base, taps[term.source], term.source, keep)
        else:
            other, peak = z[:, term.source], None
        factor = term.weight * _factor(term.rule, base, other, peak, t)[:, None]
        other = other.clamp(min=_FLOOR)
        if term.kind == "contrast":
            total = total + factor * (floored - other)
        else:
            total, gain = total + factor * other, gain + factor
    if spec.normalize:
        total = total / gain
    return total.masked_fill(base == -math.inf, -math.inf), keep


def _factor(rule: Op | None, base: Tensor, other: Tensor, peak: Tensor | None, t: Tensor) -> Tensor:
    """[n] what the term's weight is multiplied by."""
    one = torch.ones(len(base), device=base.device)
    if rule is None:
        return one
    if rule.name == "growth":
        grown = (torch.exp(rule["rate"] * (t + rule["start"]).float()) - 1).clamp(max=rule["clip"])
        unsure = base.softmax(-1).amax(-1) < rule["tau"] if rule["tau"] < 1 else one
        return grown * unsure
    if rule.name == "closeness":
        return 1 - divergence(base, other)
    assert rule.name == "probability" and peak is not None
    return peak


def _kept(z: Tensor, spec: DecodeSpec) -> Tensor | None:
    """[n, V] bool, the tokens that pass all masks; view 0's best token always does."""
    base, keep = z[:, 0], None
    for mask in spec.masks:
        if mask.name == "apc":
            passed = plausible(base, torch.full((len(z),), mask["beta"]))
        elif mask.name == "agreement":
            passed = plausible(base, divergence(base, z[:, mask["view"]]).clamp(max=1))
        else:
            passed = _nucleus(base, mask["top_k"], mask["top_p"])
        keep = passed if keep is None else keep & passed
    return keep


def _nucleus(base: Tensor, top_k: int, top_p: float) -> Tensor:
    """[n, V] bool: the ``top_k`` likeliest tokens, as long as those before them hold less than ``top_p``."""
    k = min(top_k, base.shape[-1])
    best, index = base.topk(k, dim=-1)
    p = (best - base.logsumexp(-1, keepdim=True)).exp()
    inside = p.cumsum(-1) - p < top_p
    inside[:, 0] = True
    return torch.zeros_like(base, dtype=torch.bool).scatter(1, index, inside)


def _tapped(base: Tensor, early: Tensor, tap: Tap, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Logits [n, V] that a tap stands for, chosen for each request from ``early`` [n, layers, V]; and its peak [n]."""
    early = early.float()
    if tap.select == "mean":
        return early.mean(1), None
    if tap.select == "divergent":
        chosen, peak = jensen_shannon(base[:, None], early).argmax(1), None
    else:
        p = early.softmax(-1)
        p = p if keep is None else p * keep[:, None]
        peak, chosen = p.amax(-1).max(1)
    return early[torch.arange(len(early), device=early.device), chosen], peak


def log_probabilities(
    logits: Tensor, spec: DecodeSpec, steps: Sequence[int] | None = None, taps: Sequence[Taps] | None = None
) -> Tensor:
    """Log-probabilities after the mix [n, V] for n positions of one request; ``logits`` [n, K, V].

    They are normalised over the tokens that pass the masks; the others lose ``IMPLAUSIBLE`` nats instead of all.
    Temperature applies when the method samples; top-k, top-p and min-p do not.
    """
    mixed, keep = combine(logits, [spec] * len(logits), steps, taps)
    if spec.do_sample:
        mixed = mixed / spec.temperature
    if keep is None:
        return mixed.log_softmax(-1)
    normaliser = mixed.masked_fill(~keep, -math.inf).logsumexp(-1, keepdim=True)
    return mixed - normaliser + (~keep) * IMPLAUSIBLE


def pick(mixed: Tensor, specs: Sequence[DecodeSpec], generators: Sequence[torch.Generator]) -> Tensor:
    """One token per request, [n] int64: the best one, or a draw from its own generator."""
    tokens = mixed.argmax(-1)
    for i, spec in enumerate(specs):
        if spec.do_sample:
            probs = _cut(mixed[i] / spec.temperature, spec).softmax(-1).cpu()
            tokens[i] = torch.multinomial(probs, 1, generator=generators[i])[0]
    return tokens


def _cut(z: Tensor, spec: DecodeSpec) -> Tensor:
    """Top-k, then top-p, then min-p on [V], in the order of transformers."""
    if spec.top_k and spec.top_k < len(z):
        z = z.masked_fill(z < z.topk(spec.top_k).values[-1], -math.inf)
    if spec.top_p < 1:
        ordered, index = z.sort(descending=False)
        drop = ordered.softmax(-1).cumsum(-1) <= 1 - spec.top_p
        drop[-1] = False
        z = z.masked_fill(torch.zeros_like(drop).scatter(0, index, drop), -math.inf)
    if spec.min_p:
        z = z.masked_fill(z < z.max() + math.log(spec.min_p), -math.inf)
    return z
