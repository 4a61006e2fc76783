"""Which number type is fast on this machine: measured, because instruction flags do not tell."""

from __future__ import annotations

import functools
import os
import statistics
import time

import torch
from torch import nn

# bfloat16 must win clearly, so that a busy machine does not flip the choice.
_CLEARLY = 1.3


def matmul_seconds(
    dtype: torch.dtype, rows: int = 1024, inner: int = 576, outer: int = 1536, repeats: int = 7
) -> float:
    """Median CPU-seconds of one linear layer on one thread: x [rows, inner] -> [rows, outer]."""
    x, weight = torch.randn(rows, inner).to(dtype), torch.randn(outer, inner).to(dtype)
    times = []
    with torch.no_grad():
        nn.functional.linear(x, weight)
        for _ in range(repeats):
            start = time.process_time()
            nn.functional.linear(x, weight)
            times.append(time.process_time() - start)
    return statistics.median(times)


@functools.lru_cache(maxsize=1)
def _cpu_dtype() -> torch.dtype:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    state = torch.get_rng_state()
    try:
        ratio = matmul_seconds(torch.float32) / max(matmul_seconds(torch.bfloat16), 1e-9)
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
    return torch.bfloat16 if ratio > _CLEARLY else torch.float32


def fast_dtype(device: torch.device | str | None = None) -> torch.dtype:
    """bfloat16 where this machine multiplies matrices in it clearly faster than in float32, else float32.

    Processors with the same AVX512-BF16 flag differ by a factor of six (4 times faster than float32 on some, 0.6 times
    on others), so a CPU is timed once per process (some 50 ms). The environment variable ``MMLLM_DTYPE`` (``float32``
    or ``bfloat16``) decides without timing.
    """
    asked = os.environ.get("MMLLM_DTYPE")
    if asked in ("float32", "bfloat16"):
        return getattr(torch, asked)
    kind = torch.device(device).type if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return _cpu_dtype() if kind == "cpu" else torch.float32
