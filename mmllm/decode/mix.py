"""From the logits of all views to one score vector, and from that to a token or a log-probability."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmllm.decode.spec import DecodeSpec

# What a token outside the plausibility mask loses in ``log_probabilities``: finite, so that candidates that are both
# implausible keep their order, and margins (for an AUC) stay finite.
IMPLAUSIBLE = -1000.0
# Stands for -inf inside the weighted sum: a negative weight times -inf would turn a forbidden token into the best one.
_FLOOR = -1e4


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


def scores(logits: Tensor, specs: list[DecodeSpec]) -> Tensor:
    """Mixed and masked scores [n, V] of n requests; ``logits`` [n, K, V] with unused views anything finite."""
    mixed = mix(logits, weight_table(specs, logits.shape[1]).to(logits.device))
    beta = torch.tensor([s.beta for s in specs])
    if bool((beta > 0).any()):
        mixed = mixed.masked_fill(~plausible(logits[:, 0], beta.to(logits.device)), -math.inf)
    return mixed


def weight_table(specs: list[DecodeSpec], views: int) -> Tensor:
    """[n, views] float32 weights; a prompt without media has one view only, which then carries the whole gain."""
    table = torch.zeros(len(specs), views)
    for i, spec in enumerate(specs):
        w = spec.weights
        if len(w) > views:
            table[i, 0] = sum(w)
        else:
            table[i, : len(w)] = torch.tensor(w)
    return table


def log_probabilities(logits: Tensor, spec: DecodeSpec) -> Tensor:
    """Log-probabilities after the mix [n, V] for n positions of one request; ``logits`` [n, K, V].

    They are normalised over the plausible tokens; the others lose ``IMPLAUSIBLE`` nats instead of all. Temperature
    applies when the method samples; top-k, top-p and min-p do not.
    """
    mixed = mix(logits, weight_table([spec] * len(logits), logits.shape[1]).to(logits.device))
    if spec.do_sample:
        mixed = mixed / spec.temperature
    if not spec.beta:
        return mixed.log_softmax(-1)
    keep = plausible(logits[:, 0], torch.full((len(logits),), spec.beta, device=logits.device))
    normaliser = mixed.masked_fill(~keep, -math.inf).logsumexp(-1, keepdim=True)
    return mixed - normaliser + (~keep) * IMPLAUSIBLE


def pick(mixed: Tensor, specs: list[DecodeSpec], generators: list[torch.Generator]) -> Tensor:
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
