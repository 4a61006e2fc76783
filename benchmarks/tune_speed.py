"""What each shortcut of training on a CPU is worth: seconds of the plain way over seconds of ours, in turn in one run.

    python benchmarks/tune_speed.py [--pairs 5] [--json FILE]

The LLM has SmolLM2-135M's shape with random weights; rows have the shape of the starter's (36 picture tokens, then
seven questions of some 12 tokens each, two pictures a step). A ratio above 1 means that ours is faster.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from mmllm.blocks.compute import fast_dtype
from mmllm.blocks.dropout import Dropout
from mmllm.blocks.head import logits_only_at
from mmllm.data.conversations import branch_mask
from mmllm.model.branches import without_last_tokens
from mmllm.model.fast_lora import fuse_lora
from mmllm.model.fast_norm import fuse_norms
from mmllm.model.plain_attention import NAME
from mmllm.report.figures import Figure, print_figures, write_figures
from mmllm.towers.efficientnet import EfficientNetLite0Tower
from mmllm.train.launch import set_threads

ROWS, PICTURE, QUESTIONS, QUESTION = 2, 36, 7, 12


def llm(fused: bool = True, attention: str = NAME, norms: bool = True) -> Any:
    """SmolLM2-135M's shape with LoRA on all of its layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49154, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, attn_implementation=attention,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(fast_dtype())
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    if fused:
        fuse_lora(adapted)
    if norms:
        fuse_norms(adapted)
    return adapted.train()


def shared_rows() -> dict[str, Any]:
    """One row a picture; its questions see the picture and themselves."""
    branch = torch.cat([torch.zeros(PICTURE), torch.arange(1, QUESTIONS + 1).repeat_interleave(QUESTION)]).long()
    own = torch.arange(PICTURE, PICTURE + QUESTION).repeat(QUESTIONS)
    return {
        "input_ids": torch.randint(0, 49000, (ROWS, len(branch))),
        "attention_mask": branch_mask(branch[None].expand(ROWS, -1), fast_dtype()),
        "position_ids": torch.cat([torch.arange(PICTURE), own])[None].expand(ROWS, -1),
    }


def single_rows() -> dict[str, Any]:
    """The picture again in front of every question."""
    return {"input_ids": torch.randint(0, 49000, (ROWS * QUESTIONS, PICTURE + QUESTION))}


def train_step(model: Any, inputs: dict[str, Any], answers_only: bool = True) -> Callable[[], None]:
    """Forward and backward with two answer tokens a question."""
    rows = len(inputs["input_ids"])
    count = ROWS * QUESTIONS * 2
    r, c = torch.arange(count) % rows, inputs["input_ids"].shape[1] - 1 - torch.arange(count) // rows
    target = torch.randint(0, 49000, (count,))

    def step() -> None:
        embeds = model.get_input_embeddings()(inputs["input_ids"]).requires_grad_(True)
        rest = {k: v for k, v in inputs.items() if k != "input_ids"}
        if answers_only:
            with logits_only_at(model, r, c):
                logits = model(inputs_embeds=embeds, **rest).logits[0]
        else:
            logits = model(inputs_embeds=embeds, **rest).logits[r, c]
        torch.nn.functional.cross_entropy(logits.float(), target).backward()

    return step


def tower(folded: bool, side: int = 192) -> Callable[[], None]:
    """Frozen EfficientNet-lite0 over 32 pictures: in one batch as it is, or folded in batches that fit the cache."""
    plain = EfficientNetLite0Tower(side)
    model = (plain.frozen_copy() if folded else plain).to(fast_dtype()).eval()
    size = 8 if folded else 32
    pictures = torch.randn(32, 3, side, side)

    def run() -> None:
        with torch.inference_mode():
            for part in pictures.split(size):
                model(pixel_values=part)

    return run


def dropout(ours: bool) -> Callable[[], None]:
    """The mask of a batch of 64 grids of picture features."""
    layer = Dropout(0.2) if ours else torch.nn.Dropout(0.2)
    x = torch.randn(64, 36, 1280)
    return lambda: layer(x)


def without_ends(inputs: dict[str, Any]) -> dict[str, Any]:
    """The rows as the LLM gets them: no last token of any question (``mmllm.model.branches``)."""
    branch = torch.cat([torch.zeros(PICTURE), torch.arange(1, QUESTIONS + 1).repeat_interleave(QUESTION)]).long()
    none = torch.zeros(0, dtype=torch.long)
    ids = inputs["input_ids"]
    kept = without_last_tokens(branch.expand(ROWS, -1), ids[..., None].float(), inputs["position_ids"], none, none)
    mask = branch_mask(kept[0][:1].expand(ROWS, -1), fast_dtype())
    return {"input_ids": kept[1][..., 0].long(), "attention_mask": mask, "position_ids": kept[2]}


def ratio(name: str, plain: Callable[[], None], ours: Callable[[], None], pairs: int, note: str) -> Figure:
    """Median of plain/ours over paired runs, with the smallest and largest pair."""
    for side in (plain, ours):
        side()
    found = []
    for i in range(pairs):
        seconds = {}
        for side in (plain, ours) if i % 2 else (ours, plain):
            start = time.perf_counter()
            side()
            seconds[side] = time.perf_counter() - start
        found.append(seconds[plain] / seconds[ours])
    found.sort()
    return Figure(name, found[len(found) // 2], "higher", found[0], found[-1], pairs, "ratio", note=note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json")
    args = parser.parse_args()
    set_threads(None)
    shared, model = shared_rows(), llm()
    ours = train_step(model, shared)
    figures = [
        ratio("plain_attention", train_step(llm(attention="sdpa"), shared), ours, args.pairs, "against fused SDPA"),
        ratio("fused_lora", train_step(llm(fused=False), shared), ours, args.pairs, "against peft's own layers"),
        ratio("fused_norms", train_step(llm(norms=False), shared), ours, args.pairs, "against transformers' RMSNorm"),
        ratio("answer_logits", train_step(model, shared, False), ours, args.pairs, "against logits everywhere"),
        ratio("shared_prefix", train_step(model, single_rows()), ours, args.pairs, "against one question a row"),
        ratio("branch_ends", ours, train_step(model, without_ends(shared)), args.pairs, "against rows with all tokens"),
        ratio("dropout_mask", dropout(False), dropout(True), args.pairs, "against torch's"),
        ratio("folded_tower", tower(False), tower(True), args.pairs, "against BatchNorm layers, 32 pictures a batch"),
    ]
    print_figures(figures, "seconds of the plain way over seconds of ours")
    if args.json:
        write_figures(args.json, "python benchmarks/tune_speed.py", 0, None, None, figures)


if __name__ == "__main__":
    main()
