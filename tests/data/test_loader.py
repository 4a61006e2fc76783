"""The loader plan: all cores decode between the steps of a CPU, and ahead of an accelerator but for one."""

from __future__ import annotations

import pytest

from mmllm.data.loader import LoaderPlan, loader_plan


@pytest.mark.parametrize(
    ("device", "cores", "processes", "plan"),
    [
        ("cpu", 2, 1, (2, 0)),
        ("cpu", 2, 4, (1, 0)),
        ("cuda", 1, 1, (1, 2)),
        ("cuda", 4, 1, (3, 2)),
        ("cuda", 64, 8, (7, 4)),
        ("cuda", 64, 1, (16, 4)),
    ],
)
def test_cores_are_shared_between_processes(device, cores, processes, plan):
    assert loader_plan(device, cores, processes) == LoaderPlan(*plan)
