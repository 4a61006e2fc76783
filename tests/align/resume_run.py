"""Run by test_resume.py: `mmllm align` with an objective that has state, and a hook that kills the process."""

from __future__ import annotations

import os
import signal
import sys

import torch

from mmllm.blocks.queue import FeatureQueue
from mmllm.cli.main import main
from mmllm.contracts import Objective, StepHook
from mmllm.registry import register


@register("objective", "remembering")
class Remembering(Objective):
    """A queue, a parameter and centres of the epoch, beside a teacher's stream that it brings along."""

    streams = {"image@ema": {"of": "image", "ema": {"momentum": 0.8, "end": 1.0}}}
    needs = frozenset({"image.embedding", "image@ema.embedding"})

    def setup(self, model):
        self.bend = torch.nn.Parameter(torch.ones(model.embedding_dim))
        self.queue = FeatureQueue(24, model.embedding_dim)
        self.register_buffer("centres", torch.zeros(4, model.embedding_dim))

    def on_epoch(self, bank):
        self.centres.copy_(bank.embedding("image")[0][:4])

    def forward(self, batch):
        a, b = (batch.streams[n].embedding for n in ("image", "image@ema"))
        self.recent = b.detach()
        logits = 10 * (a * self.bend) @ torch.cat([b, self.queue.content(), self.centres]).T
        return {"loss": torch.nn.functional.cross_entropy(logits, torch.arange(len(a)), reduction="none")}

    def after_step(self, model):
        self.queue.push(self.recent)


@register("step_hook", "killer")
class Killer(StepHook):
    def before_optimizer_step(self, model, step):
        if str(step) == os.environ.get("KILL_AT"):
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
