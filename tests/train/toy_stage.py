"""A tiny training stage that the tests run in real processes: python -m toy_stage OUT '{"max_steps": 20, ...}'."""

import json
import os
import signal
import sys
import time

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch import nn

from mmllm.contracts import Objective
from mmllm.errors import UserError
from mmllm.train.launch import is_main, set_threads
from mmllm.train.params import set_trainable
from mmllm.train.run import RunFolder
from mmllm.train.section import TrainSection
from mmllm.train.trainer import MMTrainer


class ToySection(TrainSection):
    connector: str = "full"


class Queue(Objective):
    """Counts its optimizer steps in a buffer: what queues and EMA do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def after_step(self, model):
        self.steps += 1


class Noisy(nn.Module):
    """Everything that a resumed run can get wrong: dropout, batch norm, numpy noise, two groups, a frozen part."""

    def __init__(self, noisy: bool):
        super().__init__()
        self.noisy = noisy
        self.tower = nn.Linear(8, 8).requires_grad_(False)
        self.connector = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16) if noisy else nn.Identity(), nn.GELU())
        self.dropout = nn.Dropout(0.2 if noisy else 0.0)
        self.head = nn.Linear(16, 1)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.queue = Queue()

    def forward(self, batch):
        x = batch["x"] + (float(np.random.rand()) * 0.1 if self.noisy else 0.0)
        out = self.head(self.dropout(self.connector(self.tower(x)))) * self.logit_scale
        errors = (out.float() - batch["y"]).square()
        return {"loss": errors.mean(), "worst": errors.detach().max()}


def pool(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Seven samples of optimizer step ``step``."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(7, 8, generator=generator)
    return x, x.sum(1, keepdim=True)


def train(out: str, options: dict) -> None:
    """Trains the toy; options: noisy, pieces, pause, die_in_save, and fields of the train section."""
    options = dict(options)
    early = options.pop("early", False)
    noisy, pause = options.pop("noisy", True), options.pop("pause", 0.0)
    die_in_save, resume = options.pop("die_in_save", None), options.pop("resume", True)
    if "fail_rank" in options and options.pop("fail_rank") == int(os.environ.get("RANK", "0")):
        raise UserError("this process fails", "toy", "try another")
    section = ToySection.model_validate({"max_steps": 20, "logging_steps": 5, "save_steps": 4, "threads": 1} | options)
    torch.manual_seed(section.seed)
    model = Noisy(noisy)
    accumulate = section.gradient_accumulation_steps

    def batch_fn(step: int, rank: int, world: int) -> dict:
        time.sleep(pause)
        x, y = pool(step // accumulate)
        piece, pieces = (step % accumulate) * world + rank, accumulate * world
        cuts = [0, 5, 7] if pieces == 2 else [0, 7]  # unequal pieces: 5 and 2 samples
        part = slice(cuts[piece], cuts[piece + 1])
        return {"x": x[part], "y": y[part], "num_items": len(x[part])}

    class Trainer(MMTrainer):
        def _save_optimizer_and_scheduler(self, output_dir):
            if die_in_save == self.state.global_step:
                os.kill(os.getpid(), signal.SIGKILL)
            super()._save_optimizer_and_scheduler(output_dir)

    groups = set_trainable(
        model,
        [
            ("connector", model.connector.parameters(), 3e-3),
            ("head", [*model.head.parameters(), model.logit_scale], None),
        ],
    )
    set_threads(1)
    if early:  # a stage may talk between its processes before the trainer exists
        assert PartialState().num_processes == int(os.environ.get("WORLD_SIZE", "1"))
    run = RunFolder.open(out, "toy", section, resume=resume, seed=section.seed)
    summary = Trainer(model, batch_fn, groups, section, run).fit()
    if is_main():
        with run.final() as folder:
            save_file(model.state_dict(), folder / "model.safetensors")
            (folder / "summary.json").write_text(json.dumps(summary))


if __name__ == "__main__":
    try:
        train(sys.argv[1], json.loads(sys.argv[2]))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
