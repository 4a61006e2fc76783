"""What a training run says while it runs: a live bar on a terminal, plain lines elsewhere, and metrics.jsonl always."""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from mmllm.train.launch import is_main

if TYPE_CHECKING:
    from mmllm.train.run import RunFolder


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    if not math.isfinite(seconds):
        return "?"
    minutes, secs = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e-2 or abs(value) >= 1e4 else f"{value:.3f}"


class ProgressReport(TrainerCallback):
    """Steps, rate, loss and time left of a training run.

    On a terminal a bar that is renewed in place; otherwise one line at each logging step.
    """

    def __init__(self, title: str, live: bool | None = None):
        self.title = title
        self.live = sys.stdout.isatty() if live is None else live
        self._bar: Any = None
        self._task: Any = None
        self._text = ""

    def on_train_begin(self, args, state, control, **kwargs):
        self._begin, self._first = time.monotonic(), state.global_step
        if not is_main():
            return
        if self.live:
            from rich import progress as rp

            self._bar = rp.Progress(
                rp.TextColumn("{task.description}"),
                rp.BarColumn(),
                rp.MofNCompleteColumn(),
                rp.TextColumn("{task.fields[text]}"),
                refresh_per_second=4,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=state.max_steps, completed=state.global_step, text="")
        else:
            start = f" (from step {state.global_step})" if state.global_step else ""
            print(f"{self.title}: {state.max_steps} steps{start}", flush=True)

    def _pace(self, state) -> tuple[float, float]:
        """(steps per second, seconds left)."""
        done = state.global_step - self._first
        rate = done / max(time.monotonic() - self._begin, 1e-9)
        return rate, (state.max_steps - state.global_step) / rate if rate else math.inf

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            rate, left = self._pace(state)
            text = f"{rate:.1f} steps/s  {clock(left)} left  {self._text}"
            self._bar.update(self._task, completed=state.global_step, text=text)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs or not is_main():
            return
        terms = [f"{k} {_number(v)}" for k, v in logs.items() if isinstance(v, float) and k not in _QUIET]
        self._text = "  ".join(terms)
        if self._bar is None:
            rate, left = self._pace(state)
            where = f"{self.title} {state.global_step}/{state.max_steps}"
            print(f"{where}  {self._text}  {rate:.1f} steps/s  {clock(left)} left", flush=True)

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Takes the bar off the terminal; also called when training fails."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


_QUIET = frozenset({"epoch", "learning_rate", "grad_norm", "total_flos", "train_loss"})


class MetricsLog(TrainerCallback):
    """Writes every logged step to ``metrics.jsonl`` of the run folder.

    A line: ``{"step", "phase"?, "loss", <named loss terms>, "learning_rate", "grad_norm", "seconds"}``; ``seconds`` is
    training time, counted on over resumptions.
    """

    def __init__(self, run: RunFolder, phase: str = ""):
        self.run, self.phase = run, phase

    def on_train_begin(self, args, state, control, **kwargs):
        self.run.forget_after(state.global_step, self.phase)
        rows = self.run.read_metrics() if is_main() else []
        rows = [r for r in rows if r.get("phase", "") == self.phase and "seconds" in r]
        self._before = rows[-1].get("seconds", 0.0) if rows else 0.0
        self._begin = time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not is_main() or not logs or "loss" not in logs:
            return
        row: dict[str, Any] = {"step": state.global_step}
        if self.phase:
            row["phase"] = self.phase
        row |= {k: v for k, v in logs.items() if k not in ("epoch", "total_flos")}
        row["seconds"] = round(self._before + time.monotonic() - self._begin, 3)
        self.run.log(row)
