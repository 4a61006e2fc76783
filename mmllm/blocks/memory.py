"""How much memory a forward keeps for its backward, and how much there is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def graph_bytes(run: Callable[[], Any], apart: Iterable[Tensor] = ()) -> int:
    """Bytes that the graph of ``run()`` keeps for its backward, beside parameters and the storages of ``apart``."""
    seen: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if not (x.is_leaf and x.requires_grad):
            storage = x.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = run()
    del out
    for x in apart:
        seen.pop(x.untyped_storage().data_ptr(), None)
    return sum(seen.values())


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device; on a CPU, within the limit of the container where there is one."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    info = Path("/proc/meminfo")
    if not info.is_file():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    lines = dict(line.split(":") for line in info.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    try:
        limit, used = (Path("/sys/fs/cgroup", name).read_text() for name in ("memory.max", "memory.current"))
        return free if limit.strip() == "max" else max(0, min(free, int(limit) - int(used)))
    except (OSError, ValueError):
        return free
