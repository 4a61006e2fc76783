"""The loss over a large vocabulary at supervised positions alone, in time and memory of ours over plain cross-entropy.

    python benchmarks/lm_head_loss.py [--pairs 7] [--json FILE]

A ratio below 1 means that ours needs less. 2,048 tokens of SmolLM2-135M's width, 49,152 words, a quarter of the tokens
supervised, in bfloat16 where the machine is faster with it; forward and backward. Plain makes the logits of all tokens
and takes torch's cross-entropy in float32 with ignored targets, as transformers does. Rows:

- lm_head_loss_vs_plain: seconds, the head frozen (connector training, LoRA); runs take turns in one process.
- lm_head_loss_trained_vs_plain: the same with a head that trains.
- lm_head_loss_memory_vs_plain: peak of resident memory above that before, each run in a fresh process after a warm-up
  with 64 tokens; the head is frozen.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from open_clip_peer import child, clock, figure, peak_extra_mb, publish, turns  # noqa: E402

from mmllm.blocks.compute import fast_dtype  # noqa: E402
from mmllm.blocks.lm_head_loss import lm_head_loss  # noqa: E402
from mmllm.report.figures import Figure, print_figures  # noqa: E402
from mmllm.train.launch import set_threads  # noqa: E402

TOKENS, WIDTH, WORDS, SHARE = 2048, 576, 49152, 0.25
TARGETS = {
    "lm_head_loss_vs_plain": 0.3,
    "lm_head_loss_trained_vs_plain": 0.3,
    "lm_head_loss_memory_vs_plain": 0.25,
}


def loss_step(side: str, trained: bool, dtype: torch.dtype, tokens: int = TOKENS) -> Callable[[], float]:
    """Forward and backward; returns the loss."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, WIDTH).to(dtype).requires_grad_(True)
    weight = (torch.randn(WORDS, WIDTH) * 0.05).to(dtype).requires_grad_(trained)
    targets, asked = torch.randint(0, WORDS, (tokens,)), torch.rand(tokens) < SHARE
    labels = torch.where(asked, targets, -100)

    def step() -> float:
        hidden.grad = weight.grad = None
        if side == "plain":
            loss = F.cross_entropy((hidden @ weight.T).float(), labels)
        else:
            loss = lm_head_loss(hidden[asked], weight, targets[asked])
        loss.backward()
        return float(loss.detach())

    return step


def measure_memory(side: str, dtype: torch.dtype) -> dict[str, float]:
    """MiB of one step in this process."""
    loss_step(side, False, dtype, 64)()
    step = loss_step(side, False, dtype)
    return {"mb": peak_extra_mb(step)}


def measure(pairs: int, threads: int, dtype: torch.dtype) -> list[Figure]:
    """All figures."""
    found: list[Figure] = []
    about = f"{TOKENS:,} tokens, {WORDS:,} words, {SHARE:.0%} supervised"

    def add(name: str, measured: list[tuple[float, float]], unit: str, note: str) -> None:
        found.append(figure(name, measured, "lower", TARGETS[name], unit, note))

    for name, trained in (("lm_head_loss_vs_plain", False), ("lm_head_loss_trained_vs_plain", True)):
        steps = [loss_step(side, trained, dtype) for side in ("plain", "ours")]
        losses = [step() for step in steps]
        if abs(losses[0] - losses[1]) > 2e-3 * abs(losses[0]):
            raise RuntimeError(f"the two losses differ: {losses}")
        plain, ours = steps
        runs = turns(lambda: clock(plain), lambda: clock(ours), pairs)  # noqa: B023
        add(name, runs, "s", f"{about}, the head {'trains' if trained else 'is frozen'}")
    kind = ["--dtype", str(dtype).split(".")[-1], "--measure"]
    runs = turns(lambda: child([*kind, "plain"], threads)["mb"], lambda: child([*kind, "ours"], threads)["mb"], pairs)
    add("lm_head_loss_memory_vs_plain", runs, "MiB", about)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--json")
    parser.add_argument("--measure", choices=["plain", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    args = parser.parse_args()
    threads = set_threads(None)
    dtype: Any = getattr(torch, args.dtype) if args.dtype else fast_dtype()
    if args.measure is not None:
        print(json.dumps(measure_memory(args.measure, dtype)))
        return
    figures = measure(args.pairs, threads, dtype)
    name = str(dtype).split(".")[-1]
    print_figures(figures, f"ours over plain cross-entropy, torch {torch.__version__}, {threads} threads, {name}")
    command = "python benchmarks/lm_head_loss.py"
    publish(args.json, command, figures, torch=torch.__version__, threads=threads, dtype=name)


if __name__ == "__main__":
    main()
