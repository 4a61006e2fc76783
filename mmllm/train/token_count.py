"""How many tokens of conversations a run trained on, and how fast."""

from __future__ import annotations

import time
from typing import Any


class TokenCount:
    """Counts the tokens of the rows that train (no padding), and the time they take after the first step."""

    def __init__(self) -> None:
        self.tokens = 0
        self.waiting = 0
        self.start: tuple[float, float] | None = None

    def hook(self) -> Any:
        """The StepHook that counts."""
        from mmllm.contracts import StepHook

        count = self

        class Count(StepHook):
            def before_forward(self, model: Any, batch: Any, step: int) -> None:
                count.waiting = int(batch["attention_mask"].sum())

            def after_backward(self, model: Any, step: int) -> None:
                if count.start is None:  # the first step also pays for warming up
                    count.start = (time.monotonic(), time.process_time())
                else:
                    count.tokens += count.waiting

        return Count()

    def report(self) -> dict[str, float]:
        """``tokens``, ``tokens_per_second`` and ``tokens_per_cpu_second`` (forward, backward and optimizer)."""
        if self.start is None or not self.tokens:
            return {}
        wall, cpu = time.monotonic() - self.start[0], time.process_time() - self.start[1]
        return {
            "tokens": self.tokens,
            "tokens_per_second": round(self.tokens / max(wall, 1e-9), 1),
            "tokens_per_cpu_second": round(self.tokens / max(cpu, 1e-9), 1),
        }
