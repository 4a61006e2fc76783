"""Contrastive training against open_clip 3.3.0 on the same towers, and against itself once features are cached.

    sh scripts/open_clip_env.sh
    python benchmarks/align_step.py [--pairs 7] [--only ROW ...] [--smoke] [--json FILE]

A ratio above 1 means that ours does more samples a second. Each is the median over pairs of runs that take turns. Rows:

- align_step_vs_open_clip: whole optimizer steps (forward, loss, backward, AdamW) on batches of 64 pictures and captions
  of the starter data, in bfloat16 autocast: MMTrainer with its defaults on an AlignModel, against open_clip_train's own
  train_one_epoch with its defaults on a CustomTextCLIP. Batches are ready in memory on both sides. Both towers are
  transformers of 6 layers of 192 over pictures of 64 px and CLIP's vocabulary; weights are copied, and the towers'
  layers are checked to compute the same.
- align_step_full_context_vs_open_clip: the same with captions that fill the context of 77 tokens.
- cached_tower_vs_first_epoch: an epoch over pictures and captions with frozen EfficientNet-lite0 and MiniLM (two heads
  train) from the features of the cache, against the first epoch, which computes them.

Where the gain comes from: mmllm reads texts to the longest of their batch (the starter's captions have 13 tokens at
most), open_clip to the end of the context; the first row over the second is what that is worth. The rest is attention
by plain matrix products (``mmllm.blocks.transformer.attend``) and the fused AdamW of MMTrainer's defaults.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_clip_peer import clip_tokenizer, clock, enter, figure, publish

enter()

import torch  # noqa: E402
from open_clip import CustomTextCLIP  # noqa: E402
from open_clip.loss import ClipLoss  # noqa: E402
from open_clip.tokenizer import SimpleTokenizer  # noqa: E402
from open_clip_train.train import train_one_epoch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from mmllm.align.config import HeadConfig  # noqa: E402
from mmllm.align.model import AlignModel, ProjectionHead  # noqa: E402
from mmllm.align.objectives import InfoNCE  # noqa: E402
from mmllm.align.reading import read_picture  # noqa: E402
from mmllm.align.step import AlignStep, Term  # noqa: E402
from mmllm.config import parse_config  # noqa: E402
from mmllm.data.features import FeatureCache  # noqa: E402
from mmllm.data.models import resolve_dataset  # noqa: E402
from mmllm.data.records import read_records  # noqa: E402
from mmllm.report.figures import Figure, print_figures  # noqa: E402
from mmllm.towers import image_inputs  # noqa: E402
from mmllm.towers.tiny import TinyViTTower  # noqa: E402
from mmllm.towers.tiny_sequences import TinyTextTower  # noqa: E402
from mmllm.train.align import AlignConfig, AlignStage  # noqa: E402
from mmllm.train.launch import set_threads  # noqa: E402
from mmllm.train.params import set_trainable  # noqa: E402
from mmllm.train.run import RunFolder  # noqa: E402
from mmllm.train.section import TrainSection  # noqa: E402
from mmllm.train.trainer import MMTrainer  # noqa: E402

CONTEXT, PATCH, HEAD_WIDTH, DIM = 77, 8, 64, 256
EPOCHS = 4  # of the cached row; the first computes the features
TARGETS = {
    "align_step_vs_open_clip": 1.8,
    "align_step_full_context_vs_open_clip": 1.1,
    "cached_tower_vs_first_epoch": 20.0,
}


@dataclass
class Size:
    """What is measured: the towers, the batch, steps in a run, and items of an epoch of the cached row."""

    layers: int = 6
    width: int = 192
    side: int = 64
    batch: int = 64
    steps: int = 4
    items: int = 1024


SMOKE = Size(layers=2, width=64, side=32, batch=8, steps=2, items=24)


def records(count: int) -> list[dict[str, Any]]:
    """So many records with pictures and captions of the starter data, evenly from its training set."""
    found = read_records(resolve_dataset("starter:full") / "align/image_train.jsonl")
    return found[:: len(found) // count][:count]


def captions(chosen: list[dict[str, Any]], full: bool) -> list[str]:
    """A caption for each record, its forms in turn; ``full``: so many in a row that they fill the context."""
    own = [r["text"][i % len(r["text"])] for i, r in enumerate(chosen)]
    return [" ".join(own[i:] + own[:i])[: 12 * CONTEXT] for i in range(len(own))] if full else own


class Batches:
    """The data set and loader that train_one_epoch asks for: batches that are ready."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]):
        self.batches, self.num_batches, self.num_samples, self.dataloader = batches, len(batches), 0, self

    def set_epoch(self, epoch: int) -> None: ...

    def __iter__(self) -> Any:
        return iter(self.batches)


def open_clip_model(size: Size) -> Any:
    """Their model without what ours lacks: no norm before the layers, mean of the tokens instead of the class token."""
    torch.manual_seed(0)
    vision = {"layers": size.layers, "width": size.width, "head_width": HEAD_WIDTH, "patch_size": PATCH,
              "image_size": size.side, "no_ln_pre": True, "pool_type": "avg"}  # fmt: skip
    text = {"layers": size.layers, "width": size.width, "heads": size.width // HEAD_WIDTH, "context_length": CONTEXT}
    return CustomTextCLIP(DIM, vision, text, output_dict=True)


def our_model(size: Size, tokenizer: str) -> AlignModel:
    heads = size.width // HEAD_WIDTH
    image = TinyViTTower(size.side, PATCH, size.width, size.layers, heads)
    text = TinyTextTower(
        hidden_size=size.width, layers=size.layers, heads=heads, max_length=CONTEXT, tokenizer=tokenizer
    )
    made = {s: ProjectionHead(size.width, DIM, HeadConfig(bias=False)) for s in ("image", "text")}
    towers = {"image": image, "text": text}
    return AlignModel(towers, {s: s for s in towers}, made, {}, [("image", "text")], DIM)


@torch.no_grad()
def copy_weights(theirs: Any, ours: AlignModel) -> None:
    """Puts their weights into our model.

    Raises:
        AssertionError: the models differ in more than their class token and our patches' bias, or compute otherwise.
    """
    image: Any = ours.tower("image")
    text: Any = ours.tower("text")
    heads: Any = ours.heads
    visual, textual = theirs.visual, theirs.text
    copied = {
        image.patch_embedding.weight: visual.conv1.weight,
        image.position_embedding: visual.positional_embedding[1:],
        text.token_embedding.weight: textual.token_embedding.weight,
        text.position_embedding: textual.positional_embedding,
        heads["image"][1].weight: visual.proj.T,
        heads["text"][1].weight: textual.text_projection.T,
        ours.logit_scale["image:text"]: theirs.logit_scale,
    }
    names = {"self_attn": "attn", "linear1": "mlp.c_fc", "linear2": "mlp.c_proj", "norm1": "ln_1", "norm2": "ln_2"}
    for tower, blocks, last in (
        (image, visual.transformer.resblocks, visual.ln_post),
        (text, textual.transformer.resblocks, textual.ln_final),
    ):
        for layer, block in [*zip(tower.encoder.layers, blocks), (tower.norm, last)]:
            for name, parameter in layer.named_parameters():
                part = name.split(".")[0]
                copied[parameter] = block.get_parameter(name.replace(part, names.get(part, part), 1))
    for mine, other in copied.items():
        mine.copy_(other.reshape(mine.shape))
    image.patch_embedding.bias.zero_()
    own = sum(p.numel() for p in ours.parameters()) - image.patch_embedding.bias.numel() - 1  # SigLIP's bias
    assert own == sum(p.numel() for p in theirs.parameters()) - 2 * visual.class_embedding.numel(), "unequal towers"
    x = torch.randn(2, 3, image.image_size, image.image_size)
    patches = visual.conv1(x).flatten(2).transpose(1, 2) + visual.positional_embedding[1:]
    torch.testing.assert_close(image(x).tokens, visual.ln_post(visual.transformer(patches)), rtol=1e-3, atol=1e-3)
    ids = torch.randint(0, text.vocab_size, (2, CONTEXT))
    words = textual.token_embedding(ids) + textual.positional_embedding
    torch.testing.assert_close(text(ids).tokens, textual.ln_final(textual.transformer(words)), rtol=1e-3, atol=1e-3)


def open_clip_steps(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """One epoch of open_clip_train over the batches, with its default optimizer."""
    named = list(model.named_parameters())
    plain = [p for n, p in named if p.ndim < 2 or any(x in n for x in ("bn", "ln", "bias", "logit_scale"))]
    kept = {id(p) for p in plain}
    groups = [{"params": plain, "weight_decay": 0.0},
              {"params": [p for _, p in named if id(p) not in kept], "weight_decay": 0.2}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=5e-4, betas=(0.9, 0.98), eps=1e-6)
    data, loss = {"train": Batches(batches)}, ClipLoss()
    args = Namespace(
        device="cpu", precision="amp_bf16", accum_freq=1, skip_scheduler=True, distill=False, grad_clip_norm=None,
        horovod=False, rank=0, world_size=1, batch_size=len(batches[0][0]), log_every_n_steps=10**9, wandb=False,
    )  # fmt: skip
    return lambda: train_one_epoch(model, data, loss, 0, optimizer, None, None, None, args)


class TakeTurns(TrainerCallback):
    """Runs theirs after every so many of our steps, and keeps the seconds of both."""

    def __init__(self, theirs: Callable[[], None], steps: int, name: str):
        self.theirs, self.steps, self.name = theirs, steps, name
        self.seconds: list[tuple[float, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.steps == 0:
            self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.steps == 0:
            ours = time.perf_counter() - self.start
            self.seconds.append((clock(self.theirs), ours))
            if len(self.seconds) > 1:
                print(f"{self.name}: {self.seconds[-1][0] / ours:.2f}", flush=True)


def step_pairs(name: str, size: Size, pairs: int, full: bool, folder: Path) -> Figure:
    """Samples a second of our steps over theirs, on the same batches."""
    tokenizer, own = clip_tokenizer(folder / "tokenizer"), SimpleTokenizer(context_length=CONTEXT)
    theirs, ours = open_clip_model(size), our_model(size, str(folder / "tokenizer"))
    copy_weights(theirs, ours)
    image: Any = ours.tower("image")
    text: Any = ours.tower("text")
    processor, chosen = image.preprocessor(), records(size.batch * size.steps)
    words = captions(chosen, full)
    assert tokenizer(words[:8])["input_ids"] == [[t for t in row if t] for row in own(words[:8], 999).tolist()]
    their_batches: list[tuple[Tensor, Tensor]] = []
    our_batches: list[dict[str, Any]] = []
    for at in range(0, len(chosen), size.batch):
        part = slice(at, at + size.batch)
        pictures = image_inputs(processor, [read_picture(r, "none", size.side, None) for r in chosen[part]])
        encoded = text.encode(words[part])
        their_batches.append((pictures["pixel_values"], own(words[part])))
        ids = [r["id"] for r in chosen[part]]
        source = {"streams": {"image": pictures, "text": encoded}, "ids": ids, "labels": ids, "boxes": None}
        our_batches.append({"sources": {"pictures": source}})
    streams = {"image": {"embedding"}, "text": {"embedding"}}
    step = AlignStep(ours, [InfoNCE(["image", "text"])], [Term("infonce", 1.0, ("pictures",))], {"pictures": streams})
    parts = ours.parts()
    groups = [(n, list(p.parameters()), None) for n, p in parts.items()]
    groups.append(("logit_scale", [ours.logit_scale["image:text"]], None))
    ours.active = set(parts)
    # One more run of both as a warm-up.
    more: Any = {"save_strategy": "no"}
    section = TrainSection(max_steps=(pairs + 1) * size.steps, bf16=True, logging_steps=10**6, **more)
    run = RunFolder.open(folder / name, "align", section)
    trainer = MMTrainer(
        step, lambda n, rank, world: our_batches[n % size.steps], set_trainable(step, groups), section, run, phase=name
    )
    turns = TakeTurns(open_clip_steps(theirs, their_batches), size.steps, name)
    trainer.add_callback(turns)
    trainer.fit()
    samples = len(chosen)
    rates = [(samples / a, samples / b) for a, b in turns.seconds[1:]]
    longest = [b["sources"]["pictures"]["streams"]["text"]["input_ids"].shape[1] for b in our_batches]
    lengths = [len(x) for x in tokenizer(words, truncation=True, max_length=CONTEXT)["input_ids"]]
    note = f"captions of {sum(lengths) / len(lengths):.0f} tokens on average, longest of a batch {max(longest)}"
    return figure(name, rates, "higher", TARGETS[name], "samples/s", note)


def cached_config(size: Size, folder: Path) -> AlignConfig:
    """Frozen starter towers with a head each, four epochs over the pictures of ``folder``."""
    head = {"bias": False}
    return parse_config(
        {
            "dataset": str(folder),
            "streams": {
                "image": {"modality": "vision", "tower": "starter:efficientnet-lite0", "image_size": 192, "head": head},
                "text": {"modality": "text", "tower": "starter:all-minilm-l6-v2", "head": head},
            },
            "train": {"num_train_epochs": EPOCHS, "per_device_train_batch_size": size.batch,
                      "logging_steps": size.items // size.batch, "save_strategy": "no"},
            "phases": {
                "pictures": {
                    "sources": {"pictures": {"data": "pictures.jsonl", "streams": ["image", "text"],
                                             "sampler": "shuffle"}},
                    "objectives": [{"type": "infonce", "options": {"pair": ["image", "text"]}}],
                    "trains": ["image.head", "text.head"],
                }
            },
        },
        AlignConfig,
    )  # fmt: skip


def cached_run(config: AlignConfig, size: Size, folder: Path, name: str) -> tuple[float, float]:
    """Seconds of the first epoch of a run, with all that comes before it, and of a later one."""
    run = RunFolder.open(folder / name, "align", config)
    stage = AlignStage(config, run)
    stage.frozen.cache = FeatureCache(folder / "features")
    (phase,) = config.phases.values()
    seconds = clock(lambda: stage.train_phase(0, phase))
    ended = [row["seconds"] for row in run.read_metrics()]
    later = ended[-1] - ended[0]
    return seconds - later, later / (EPOCHS - 1)


def cached_pairs(name: str, size: Size, pairs: int, folder: Path) -> Figure:
    """Samples a second of an epoch from cached features over those of the first epoch, both in one run."""
    chosen = records(size.items)
    lines = [json.dumps({k: r[k] for k in ("id", "image", "text")}) + "\n" for r in chosen]
    (folder / "pictures.jsonl").write_text("".join(lines))
    config = cached_config(size, folder)
    rates, starts = [], []
    for _ in range(pairs):
        with tempfile.TemporaryDirectory(dir=folder) as own:
            first, later = cached_run(config, size, Path(own), "run")
            starts.append(cached_run(config, size, Path(own), "again")[0] / first)
        rates.append((size.items / first, size.items / later))
        print(f"{name}: {first / later:.1f}", flush=True)
    again = statistics.median(starts)
    note = f"{size.items:,} pictures at 192 px, two heads; a new run starts in {again:.2f} of the first time"
    return figure(name, rates, "higher", TARGETS[name], "samples/s", note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=list(TARGETS), default=list(TARGETS), metavar="ROW")
    parser.add_argument("--smoke", action="store_true", help="tiny towers and batches: does it run at all")
    parser.add_argument("--json")
    args = parser.parse_args()
    threads, size = set_threads(None), SMOKE if args.smoke else Size()
    logging.getLogger().setLevel(logging.WARNING)
    figures = []
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            if name == "cached_tower_vs_first_epoch":
                figures.append(cached_pairs(name, size, args.pairs, Path(folder)))
            else:
                figures.append(step_pairs(name, size, args.pairs, "full_context" in name, Path(folder)))
    print_figures(figures, f"samples/s over those of the other, torch {torch.__version__}, {threads} threads")
    command = "python benchmarks/align_step.py"
    publish(args.json, command, figures, torch=torch.__version__, threads=threads)


if __name__ == "__main__":
    main()
