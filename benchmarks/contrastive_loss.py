"""Large batches against open_clip 3.3.0: the tiled loss and encoding in chunks, in time and memory of ours over theirs.

    sh scripts/open_clip_env.sh
    python benchmarks/contrastive_loss.py [--pairs 7] [--only ROW ...] [--json FILE]

A ratio below 1 means that ours needs less. Each is the median over pairs of runs that take turns. Features have 512
dimensions and unit norm, in float32. Rows:

- tiled_memory_vs_plain, tiled_time_vs_plain: symmetric InfoNCE forward and backward at batch 16,384 against ClipLoss,
  each run in a fresh process after a warm-up at batch 1,024; memory is the peak of resident memory above that before.
- tiled_time_vs_plain_1024: the same at batch 1,024, in one process.
- gradcache_time_vs_open_clip_accum: one optimizer step on 4,096 pairs of stored features with two linear heads, in 8
  chunks, against open_clip_train's own train_one_epoch with --accum-freq 8.
- gradcache_vit_memory_16_chunks: peak memory of one step of a ViT (6 layers of 192, 64 px) on 16 chunks of 64 pictures
  over that of one chunk of 64, again above what is there before. Both processes give freed memory back at once (glibc's
  MALLOC_MMAP_THRESHOLD_), so that what is counted is in use.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from open_clip_peer import child, clock, enter, figure, peak_extra_mb, publish, turns

enter()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from open_clip.loss import ClipLoss  # noqa: E402
from open_clip_train.train import train_one_epoch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from mmllm.blocks.chunks import in_chunks  # noqa: E402
from mmllm.blocks.tiled_contrast import contrast  # noqa: E402
from mmllm.report.figures import Figure, print_figures  # noqa: E402
from mmllm.towers.tiny import TinyViTTower  # noqa: E402
from mmllm.train.launch import set_threads  # noqa: E402

BIG, SMALL, DIM = 16384, 1024, 512
ITEMS, CHUNKS = 4096, 8
PICTURES, PICTURE_CHUNKS = 64, 16
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
TARGETS = {
    "tiled_memory_vs_plain": 1 / 25,
    "tiled_time_vs_plain": 0.8,
    "tiled_time_vs_plain_1024": 1.1,
    "gradcache_time_vs_open_clip_accum": 0.25,
    "gradcache_vit_memory_16_chunks": 1.25,
}


def features(n: int, seed: int) -> Tensor:
    """Unit vectors [n, DIM]."""
    return F.normalize(torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed)), dim=-1)


def loss_step(side: str, n: int) -> Callable[[], None]:
    """Forward and backward of the symmetric InfoNCE on n pairs, with gradients to features and scale."""
    image, text = features(n, 0).requires_grad_(), features(n, 1).requires_grad_()
    scale = torch.tensor(1 / 0.07, requires_grad=True)
    clip_loss = ClipLoss()

    def step() -> None:
        image.grad = text.grad = scale.grad = None
        if side == "plain":
            clip_loss(image, text, scale).backward()
        else:
            contrast(image, text, scale=scale, symmetric=True).mean().backward()

    return step


def measure_loss(side: str, n: int) -> dict[str, float]:
    """Seconds and MiB of one step in this process."""
    loss_step(side, SMALL)()
    step = loss_step(side, n)
    seconds: list[float] = []
    mb = peak_extra_mb(lambda: seconds.append(clock(step)))
    return {"seconds": seconds[0], "mb": mb}


class Heads(nn.Module):
    """Two linear heads over stored features and a logit scale: what both sides train."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        image, text = F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1)
        return {"image_features": image, "text_features": text}

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        return self.encode(images, texts) | {"logit_scale": self.logit_scale.exp()}


class Stored:
    """The data set and loader that train_one_epoch asks for: one optimizer step's worth of stored features."""

    def __init__(self, images: Tensor, texts: Tensor):
        self.batches = list(zip(images.chunk(CHUNKS), texts.chunk(CHUNKS)))
        self.num_batches, self.num_samples, self.dataloader = CHUNKS, len(images), self

    def set_epoch(self, epoch: int) -> None: ...

    def __iter__(self) -> Any:
        return iter(self.batches)


def accumulation_steps() -> tuple[Callable[[], None], Callable[[], None], Heads, Heads]:
    """open_clip's accumulation and ours on the same features, with the two models that they train."""
    images, texts = features(ITEMS, 0), features(ITEMS, 1)
    theirs, ours = Heads(), Heads()
    # A rate of 0 keeps both models where they are, so that every step is the same work.
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.0, weight_decay=0.0) for m in (theirs, ours)]
    clip_loss, data = ClipLoss(), {"train": Stored(images, texts)}
    args = Namespace(
        device="cpu", precision="fp32", accum_freq=CHUNKS, skip_scheduler=True, distill=False, grad_clip_norm=None,
        horovod=False, rank=0, world_size=1, batch_size=ITEMS // CHUNKS, log_every_n_steps=10**9, wandb=False,
    )  # fmt: skip

    def accumulate() -> None:
        train_one_epoch(theirs, data, clip_loss, 0, optimizers[0], None, None, None, args)

    def chunks() -> None:
        optimizers[1].zero_grad()
        out = in_chunks(lambda part: ours.encode(*part), (images, texts), ITEMS // CHUNKS)
        scale = ours.logit_scale.exp()
        contrast(out["image_features"], out["text_features"], scale=scale, symmetric=True).mean().backward()
        optimizers[1].step()

    return accumulate, chunks, theirs, ours


def accumulation_note() -> str:
    """How both sides' gradients compare with those of one plain pass over the whole batch."""
    accumulate, chunks, theirs, ours = accumulation_steps()
    plain = Heads()
    out = plain(features(ITEMS, 0), features(ITEMS, 1))
    ClipLoss()(**out).backward()
    accumulate()
    chunks()
    scale = [float(m.logit_scale.grad) for m in (theirs, ours, plain)]  # pyright: ignore[reportArgumentType]
    pairs = zip(ours.parameters(), plain.parameters())
    off = max(float((a.grad - b.grad).norm() / b.grad.norm()) for a, b in pairs)  # pyright: ignore
    return (
        f"gradients against one plain pass: ours within {off:.0e} of each, "
        f"logit_scale {scale[1] / scale[2]:.2f} times, open_clip's {scale[0] / scale[2]:.2f} times"
    )


def measure_vit(chunks: int) -> dict[str, float]:
    """MiB of one step of a ViT on so many chunks of pictures, after one step as a warm-up."""
    torch.manual_seed(0)
    tower, head = TinyViTTower(), nn.Linear(192, DIM)
    pictures, texts = torch.randn(chunks * PICTURES, 3, 64, 64), features(chunks * PICTURES, 1)
    scale = torch.tensor(1 / 0.07, requires_grad=True)

    def encode(part: Tensor) -> Tensor:
        return F.normalize(head(tower(part).pooled), dim=-1)

    def step(n: int) -> None:
        made = in_chunks(encode, pictures[:n], PICTURES)
        contrast(made, texts[:n], scale=scale, symmetric=True).mean().backward()

    step(2 * PICTURES)
    return {"mb": peak_extra_mb(lambda: step(len(pictures)))}


def measure(wanted: set[str], pairs: int, threads: int) -> list[Figure]:
    """The figures of the wanted rows."""
    found = []

    def add(name: str, measured: list[tuple[float, float]], unit: str, note: str) -> None:
        found.append(figure(name, measured, "lower", TARGETS[name], unit, note))

    if wanted & {"tiled_memory_vs_plain", "tiled_time_vs_plain"}:
        runs = [(child(["--measure", "plain"], threads), child(["--measure", "tiled"], threads)) for _ in range(pairs)]
        about = f"batch {BIG:,}, ClipLoss -> ours"
        add("tiled_memory_vs_plain", [(a["mb"], b["mb"]) for a, b in runs], "MiB", about)
        add("tiled_time_vs_plain", [(a["seconds"], b["seconds"]) for a, b in runs], "s", about)
    if "tiled_time_vs_plain_1024" in wanted:
        steps = [loss_step(side, SMALL) for side in ("plain", "tiled")]
        for step in steps:
            step()
        # A step takes less than a tenth of a second, so each run is three of them.
        runs = turns(*(lambda step=step: clock(lambda: [step() for _ in range(3)]) / 3 for step in steps), 3 * pairs)
        add("tiled_time_vs_plain_1024", runs, "s", f"batch {SMALL:,}, ClipLoss -> ours")
    if "gradcache_time_vs_open_clip_accum" in wanted:
        note = accumulation_note()
        accumulate, chunks, _, _ = accumulation_steps()
        runs = turns(lambda: clock(accumulate), lambda: clock(chunks), pairs)
        add("gradcache_time_vs_open_clip_accum", runs, "s", note)
    if "gradcache_vit_memory_16_chunks" in wanted:
        sides = [["--measure", "vit", "--chunks", str(n)] for n in (1, PICTURE_CHUNKS)]
        runs = turns(*(lambda s=s: child(s, threads, **GIVE_BACK)["mb"] for s in sides), pairs)
        add("gradcache_vit_memory_16_chunks", runs, "MiB", "one chunk -> 16 chunks, both ours")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=list(TARGETS), default=list(TARGETS), metavar="ROW")
    parser.add_argument("--json")
    parser.add_argument("--measure", choices=["plain", "tiled", "vit"], help=argparse.SUPPRESS)
    parser.add_argument("--chunks", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    threads = set_threads(None)
    logging.getLogger().setLevel(logging.WARNING)
    if args.measure is not None:
        print(json.dumps(measure_vit(args.chunks) if args.measure == "vit" else measure_loss(args.measure, BIG)))
        return
    figures = measure(set(args.only), args.pairs, threads)
    print_figures(figures, f"ours over open_clip 3.3.0, torch {torch.__version__}, {threads} threads")
    command = "python benchmarks/contrastive_loss.py"
    publish(args.json, command, figures, torch=torch.__version__, threads=threads)


if __name__ == "__main__":
    main()
