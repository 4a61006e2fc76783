"""Batches from webdataset shards against open_clip 3.3.0's own pipeline: pictures a second of ours over theirs.

    sh scripts/open_clip_env.sh
    python benchmarks/loader.py [--pairs 7] [--workers 2] [--only ROW ...] [--smoke] [--json FILE]

A ratio above 1 means that ours gives more pictures a second. Each is the median over pairs of epochs that take turns,
after one epoch of each as a warm-up. The shards are made on the spot in open_clip's layout (jpg and txt): JPEGs of
576 x 576, each nine scenes of the starter data, with what is on them as caption. Theirs is open_clip_train's
get_wds_dataset with so many worker processes, ours an AlignSource with as many threads, whose batches are made ahead as
MMTrainer does beside an accelerator. Both decode with Pillow, resize to 224 px, normalise and use CLIP's tokenizer.
What ours saves is the way of a batch from one process to another. Rows:

- loader_vs_open_clip: both decode whole pictures for open_clip's training transform, a random resized crop.
- loader_draft_vs_open_clip: both squash the whole picture to the target; ours decodes a JPEG at half its size for that.
"""

from __future__ import annotations

import argparse
import io
import itertools
import logging
import tarfile
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_clip_peer import clip_tokenizer, clock, enter, figure, publish, turns

enter()

import open_clip  # noqa: E402
import torch  # noqa: E402
from open_clip.transform import image_transform  # noqa: E402
from open_clip_train.data import get_wds_dataset  # noqa: E402
from PIL import Image  # noqa: E402

from mmllm.align.config import SourceConfig  # noqa: E402
from mmllm.align.frozen import FrozenFeatures  # noqa: E402
from mmllm.align.model import AlignModel  # noqa: E402
from mmllm.align.source import AlignSource  # noqa: E402
from mmllm.data.features import FeatureCache  # noqa: E402
from mmllm.data.loader import loader_plan  # noqa: E402
from mmllm.data.media import load_image  # noqa: E402
from mmllm.data.models import resolve_dataset  # noqa: E402
from mmllm.data.open import open_records  # noqa: E402
from mmllm.data.records import read_records  # noqa: E402
from mmllm.report.figures import Figure, print_figures  # noqa: E402
from mmllm.towers import image_inputs  # noqa: E402
from mmllm.towers.tiny import TinyViTTower  # noqa: E402
from mmllm.towers.tiny_sequences import TinyTextTower  # noqa: E402
from mmllm.train.batches import StepBatches  # noqa: E402
from mmllm.train.launch import set_threads  # noqa: E402

SIDE, GRID, SHARDS = 224, 3, 4
CROP = {"type": "random_resized_crop", "size": SIDE, "scale": [0.9, 1.0]}  # open_clip's training transform
TARGETS = {"loader_vs_open_clip": 0.95, "loader_draft_vs_open_clip": 1.8}


@dataclass
class Size:
    """Pictures of an epoch, and of a batch."""

    items: int = 1024
    batch: int = 64


SMOKE = Size(items=32, batch=8)


def make_shards(folder: Path, items: int) -> str:
    """Tars of so many mosaics of the starter's scenes with their captions; the pattern that names them."""
    scenes = read_records(resolve_dataset("starter:full") / "align/regions_train.jsonl")
    at = 0
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:02d}.tar", "w") as tar:
            for i in range(shard, items, SHARDS):
                chosen = [scenes[(at + k) % len(scenes)] for k in range(GRID**2)]
                at += GRID**2
                names = ", ".join(dict.fromkeys(b["text"] for r in chosen for b in r["boxes"]))
                for ending, data in (("jpg", mosaic([r["image"] for r in chosen])), ("txt", names.encode())):
                    member = tarfile.TarInfo(f"{i:06d}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return f"{folder}/{{00..{SHARDS - 1:02d}}}.tar"


def mosaic(files: list[str]) -> bytes:
    """GRID x GRID pictures of 192 px as one JPEG."""
    out = Image.new("RGB", (192 * GRID, 192 * GRID))
    for i, file in enumerate(files):
        with Image.open(file) as picture:
            out.paste(picture, (192 * (i % GRID), 192 * (i // GRID)))
    data = io.BytesIO()
    out.save(data, "JPEG", quality=90)
    return data.getvalue()


def their_epoch(shards: str, draft: bool, size: Size, workers: int, processor: Any) -> Callable[[], None]:
    """One epoch of open_clip_train's pipeline.

    Raises:
        AssertionError: their transform gives other pixels than ``processor``.
    """
    args = Namespace(
        train_data=shards, train_num_samples=size.items, dataset_resampled=False, train_data_upsampling_factors=None,
        seed=0, workers=workers, world_size=1, batch_size=size.batch,
    )  # fmt: skip
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    transform: Any = image_transform(SIDE, True, mean, std)
    if draft:
        transform = image_transform(SIDE, False, mean, std, resize_mode="squash", interpolation="bilinear")
        picture = load_image(next(open_records(shards))["image"])
        torch.testing.assert_close(transform(picture), image_inputs(processor, [picture])["pixel_values"][0])
    data = get_wds_dataset(args, transform, True, tokenizer=open_clip.get_tokenizer("ViT-B-32"))
    numbers = itertools.count()

    def epoch() -> None:
        data.set_epoch(next(numbers))
        count = sum(len(images) for images, _ in data.dataloader)
        assert count == size.items, count

    return epoch


def our_epoch(
    shards: str, draft: bool, size: Size, workers: int, image: TinyViTTower, tokenizer: str, folder: Path
) -> Callable[[], None]:
    """One epoch of an AlignSource's batches."""
    towers = {
        "image": image,
        "text": TinyTextTower(hidden_size=8, layers=1, heads=1, max_length=77, tokenizer=tokenizer),
    }
    model = AlignModel(towers, {s: s for s in towers}, {}, {})
    config = SourceConfig(data=shards, streams=["image", "text"], sampler="shuffle", transforms=[] if draft else [CROP])
    frozen = FrozenFeatures(FeatureCache(folder / "features"), torch.float32, torch.device("cpu"))
    source = AlignSource(
        "pictures", config, list(open_records(shards)), model, {}, {"image", "text"}, frozen, 0, 0, size.batch,
        workers=workers,
    )  # fmt: skip
    steps, prefetch = size.items // size.batch, loader_plan("cuda", workers).prefetch
    numbers = itertools.count()

    def epoch() -> None:
        first = next(numbers) * steps
        batches = StepBatches(lambda n, rank, world: source.batch(first + n, rank, world), steps, 0, 1, prefetch)
        count = sum(len(batches[n]["streams"]["image"]["pixel_values"]) for n in range(steps))
        batches.close()
        assert count == size.items, count

    return epoch


def row(name: str, shards: str, size: Size, pairs: int, workers: int, folder: Path) -> Figure:
    """Pictures a second of our epochs over theirs, in turn."""
    image, draft = TinyViTTower(SIDE, 16, 8, 1, 1), "draft" in name
    theirs = their_epoch(shards, draft, size, workers, image.preprocessor())
    ours = our_epoch(shards, draft, size, workers, image, str(folder / "tokenizer"), folder)
    theirs()
    ours()

    def rate(side: str, epoch: Callable[[], None]) -> float:
        found = size.items / clock(epoch)
        print(f"{name}: {side} {found:.0f} pictures/s", flush=True)
        return found

    measured = turns(lambda: rate("theirs", theirs), lambda: rate("ours", ours), pairs)
    bytes_each = sum(p.stat().st_size for p in folder.glob("*.tar")) / size.items
    note = f"JPEGs of {192 * GRID} px, {bytes_each / 1000:.0f} kB each, to {SIDE} px, {workers} workers each"
    return figure(name, measured, "higher", TARGETS[name], "pictures/s", note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=list(TARGETS), default=list(TARGETS), metavar="ROW")
    parser.add_argument("--smoke", action="store_true", help="a few pictures: does it run at all")
    parser.add_argument("--json")
    args = parser.parse_args()
    threads, size = set_threads(None), SMOKE if args.smoke else Size()
    logging.getLogger().setLevel(logging.WARNING)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        shards = make_shards(folder, size.items)
        clip_tokenizer(folder / "tokenizer")
        figures = [row(name, shards, size, args.pairs, args.workers, folder) for name in args.only]
    print_figures(figures, f"pictures/s of ours over open_clip 3.3.0's, torch {torch.__version__}, {threads} threads")
    publish(args.json, "python benchmarks/loader.py", figures, torch=torch.__version__, threads=threads)


if __name__ == "__main__":
    main()
