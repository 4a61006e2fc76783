"""Batches of random unit vectors for the oracles of methods."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmllm.contracts import AlignBatch, Features, Stream


def units(*shape, seed=0):
    """Random unit vectors."""
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def batch_of(rows, scale=10.0, **about):
    """An AlignBatch of streams: name -> embedding [B, P], or (tokens [B, M, P], mask [B, M] or None) of a token head.

    Every pair of streams has the same ``logit_scale``; ``about`` goes to the batch.
    """
    streams = {}
    for name, value in rows.items():
        if isinstance(value, tuple):
            tokens, mask = value
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask
            features = Features(tokens, mask, tokens.mean(1))
            streams[name] = Stream(features, token_embedding=tokens, token_mask=mask)
            streams[name].embedding = F.normalize(tokens.mean(1), dim=-1)
        else:
            streams[name] = Stream(embedding=value)
    scales = {f"{a}:{b}": torch.as_tensor(scale) for a in rows for b in rows}
    biases = {p: torch.tensor(0.0) for p in scales}
    return AlignBatch(streams, logit_scale=scales, logit_bias=biases, **about)


@pytest.fixture
def make_batch():
    return batch_of


@pytest.fixture
def unit():
    return units
