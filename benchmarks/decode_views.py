"""What views cost: seconds of a method over seconds of greedy, of sharing and of transformers' own loop, in one run.

    python benchmarks/decode_views.py [--pairs 7] [--dtype bfloat16] [--json FILE]

The model is real: SmolLM2-135M-Instruct behind a frozen EfficientNet-lite0 (its 36 picture tokens at 192 px) and a
fresh connector, so its words are nonsense but its time is not. Captions are 64 tokens long whatever they say; tower,
preprocessing and prefill are included.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmllm.blocks.compute import fast_dtype
from mmllm.data.models import resolve_model
from mmllm.decode import Decoder, Request
from mmllm.model.loading import build_model
from mmllm.report.figures import Figure, print_figures, write_figures
from mmllm.towers import load_tower
from mmllm.train.launch import set_threads

LENGTH, QUESTIONS = 64, 12
FOUR_VIEWS = "vcd+blank+ritual:transform=hflip"


def pictures(count: int) -> list[Image.Image]:
    """Different noise pictures, 192 px."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (192, 192, 3), np.uint8)) for _ in range(count)]


def ask(picture: Image.Image, question: str = "What is in the picture?") -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]


def captions(model: Any, processor: Any, batch: int, decode: str) -> Callable[[], None]:
    """A fresh decoder each time, so that no picture is in its cache."""
    shown = pictures(batch)

    def run() -> None:
        requests = [Request(ask(p), decode, LENGTH, min_new_tokens=LENGTH) for p in shown]
        results = Decoder(model, processor).generate(requests)
        assert all(len(r.token_ids) == LENGTH for r in results)

    return run


def generated(model: Any, processor: Any, batch: int) -> Callable[[], None]:
    """The same captions by transformers' own generate."""
    shown = pictures(batch)

    def run() -> None:
        given = processor.apply_chat_template(
            [ask(p) for p in shown], tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt",
            processor_kwargs={"padding": True},
        )  # fmt: skip
        with torch.inference_mode():
            model.generate(**given, do_sample=False, max_new_tokens=LENGTH, min_new_tokens=LENGTH)

    return run


def polling(model: Any, processor: Any, share: bool) -> Callable[[], None]:
    """Twelve yes/no questions on one picture with VCD."""
    (picture,) = pictures(1)
    names = ["cat", "dog", "bell", "lamp", "tree", "car", "fish", "cup", "hat", "key", "drum", "boat"]

    def run() -> None:
        requests = [Request(ask(picture, f"Is there a {n} in the picture?"), "vcd") for n in names[:QUESTIONS]]
        Decoder(model, processor, share_prefix=share).score(requests, [["yes", "no"]] * QUESTIONS)

    return run


def ratio(
    name: str, ours: Callable[[], None], other: Callable[[], None], pairs: int, target: float, note: str
) -> Figure:
    """Median of ours/other over paired runs, the order changing, with the smallest and largest pair."""
    for side in (ours, other):
        side()
    found = []
    for i in range(pairs):
        seconds = {}
        for side in (ours, other) if i % 2 else (other, ours):
            start = time.perf_counter()
            side()
            seconds[side] = time.perf_counter() - start
        found.append(seconds[ours] / seconds[other])
    found.sort()
    return Figure(name, found[len(found) // 2], "lower", found[0], found[-1], pairs, "ratio", target=target, note=note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=str(fast_dtype()).removeprefix("torch."))
    parser.add_argument("--json")
    args = parser.parse_args()
    set_threads(None)
    llm, tower = resolve_model("starter:smollm2-135m-instruct"), resolve_model("starter:efficientnet-lite0")
    torch.manual_seed(0)
    parts = build_model(
        llm, load_tower({"model": tower, "image_size": 192}, "vision"), dtype=getattr(torch, args.dtype)
    )
    parts[0].eval()

    def against_greedy(decode: str, batch: int) -> tuple[Callable[[], None], Callable[[], None]]:
        return captions(*parts, batch, decode), captions(*parts, batch, "greedy")

    figures = [
        ratio("vcd_vs_greedy_batch1", *against_greedy("vcd", 1), args.pairs, 1.25, "2 views, two passes would be 2"),
        ratio("four_views_vs_greedy_batch1", *against_greedy(FOUR_VIEWS, 1), args.pairs, 1.45, FOUR_VIEWS),
        ratio("vcd_vs_greedy_batch8", *against_greedy("vcd", 8), args.pairs, 1.5, "8 pictures together"),
        ratio("vcd_polling_shared_vs_unshared", polling(*parts, True), polling(*parts, False), args.pairs, 0.5,
              "12 yes/no questions on one picture"),
        ratio("own_loop_vs_generate", captions(*parts, 1, "greedy"), generated(*parts, 1), args.pairs, 1.05,
              "greedy, one picture"),
        ratio("own_loop_vs_generate_batch8", captions(*parts, 8, "greedy"), generated(*parts, 8), args.pairs, 1.05,
              "greedy, 8 pictures"),
    ]  # fmt: skip
    print_figures(
        figures, f"seconds of ours over seconds of the other, {args.dtype}, {torch.get_num_threads()} threads"
    )
    if args.json:
        write_figures(args.json, "python benchmarks/decode_views.py", 0, None, None, figures, dtype=args.dtype)


if __name__ == "__main__":
    main()
