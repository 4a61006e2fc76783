"""Connector training against a plain transformers Trainer with padded batches, packing, and use of the processor.

    python benchmarks/tune_step.py [--pairs 5] [--only ROW ...] [--smoke] [--json FILE]

The model is a LlavaForConditionalGeneration with SmolLM2-135M-Instruct and a vision tower of CLIP-B/16's shape (224 px,
12 layers of 768, random weights, 196 tokens a picture); the connector trains, tower and LLM are frozen, in bfloat16 on
both sides. Records are the starter's conversations about pictures, each with all its questions. Rows:

- tune_vs_padded_trainer: supervised tokens a second of one epoch of ours that begins without features (each picture
  goes once through the tower, with reading and storing), against an epoch of the Trainer (each picture goes through the
  tower in its step). Both have the same records in batches of the same size. The Trainer's rows are the usual ones: all
  questions of a record as turns of one conversation, shuffled, padded to the longest of the batch, here tokenised
  beforehand; it reads pictures in the collator. Its loss is that of transformers, on all logits.
- tune_cached_vs_padded_trainer: the same with our features in the cache from the run before.
- packing_fill: how full packed rows of 2,048 tokens of these conversations are (one epoch).
- packing_fill_mixed: the same of 20 % text, 60 % one picture of 64 tokens, 15 % five tiles of one, 5 % four pictures.
- packing_plan_share: seconds of planning packed rows over seconds of training them (the cached row's rate).
- matmul_fraction: share of the machine's measured bfloat16 matmul rate that forward and backward of the frozen LLM
  reach on 8 rows of 130 tokens: 4 operations a parameter and token (6 where weights train), those of the output head at
  the 96 supervised places alone; attention and all else counts as time, not as work.

With one thread, seconds are those of the processor, so that other work on the machine counts less; with more, the
clock's. Where the gain over the Trainer comes from: logits at the supervised places alone, rows of similar length
together, plain attention on short rows, and a tower that runs once.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from open_clip_peer import clock, figure, publish  # noqa: E402
from padded_peer import SMOKE, Ours, Size, Theirs, as_turns, check_same, make_llava, starter_records  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from mmllm.blocks.head import loss_at_head  # noqa: E402
from mmllm.data.chat_batches import record_media  # noqa: E402
from mmllm.data.conversations import IGNORE, Encoded  # noqa: E402
from mmllm.data.models import resolve_model  # noqa: E402
from mmllm.data.packing import PackedBatches  # noqa: E402
from mmllm.report.figures import Figure, print_figures  # noqa: E402
from mmllm.train.launch import set_threads  # noqa: E402

ROW, MIX = 2048, {0: 0.20, 1: 0.60, 5: 0.15, 4: 0.05}  # pictures (or tiles) of a conversation -> share
LIVE, CACHED = "tune_vs_padded_trainer", "tune_cached_vs_padded_trainer"
TARGETS = {
    LIVE: 1.5, CACHED: 2.0, "packing_fill": 0.95, "packing_fill_mixed": 0.99, "packing_plan_share": 0.001,
    "matmul_fraction": 0.45,
}  # fmt: skip


def spent(run: Callable[[], Any]) -> float:
    """Seconds that ``run()`` takes: of the processor with one thread, by the clock with more."""
    if torch.get_num_threads() > 1:
        return clock(run)
    start = time.process_time()
    run()
    return time.process_time() - start


def supervised(rows: Sequence[Encoded]) -> int:
    return sum(sum(label != IGNORE for label in r.labels[1:]) for r in rows)


def trainer_figures(only: Sequence[str], size: Size, pairs: int, folder: Path) -> tuple[list[Figure], float | None]:
    """The rows against the Trainer, and our seconds of training a token of the LLM with cached features."""
    make_llava(folder / "llava", size)
    records = starter_records(size.data, size.items)
    ours = Ours(folder / "llava", records, size, folder)
    theirs = Theirs(folder / "llava", records, size, folder, ours.processor)
    check_same(ours, theirs)
    rows = ours.rows()
    tokens = [supervised(theirs.rows), supervised(rows)]
    if abs(tokens[0] - tokens[1]) > 0.01 * tokens[0]:
        raise RuntimeError(f"supervised tokens differ: {tokens}")
    all_tokens = [sum(len(r.input_ids) for r in x) for x in (theirs.rows, rows)]
    ours.epoch(folder / "warm")  # fills the cache of the second row, and warms up
    about = (
        f"{len(records)} conversations of {all_tokens[0] / len(rows):.0f} tokens, {tokens[0] / len(rows):.0f} "
        f"supervised, batches of {size.batch}"
    )
    found: dict[str, list[float]] = {"theirs": [], LIVE: [], CACHED: []}
    for pair in range(pairs):
        sides: dict[str, Callable[[], None]] = {
            "theirs": theirs.epoch,
            LIVE: lambda: ours.epoch(folder / f"cold{pair}"),  # noqa: B023
            CACHED: lambda: ours.epoch(folder / "warm"),
        }
        names = [n for n in sides if n == "theirs" or n in only]
        for name in names[pair % len(names) :] + names[: pair % len(names)]:
            found[name].append(spent(sides[name]))
            print(f"{name}: {found[name][-1]:.1f} s", flush=True)
    figures = []
    for name in [n for n in (LIVE, CACHED) if n in only]:
        rates = [(tokens[0] / a, tokens[1] / b) for a, b in zip(found["theirs"], found[name], strict=True)]
        unit = f"supervised tokens a {'CPU-' if torch.get_num_threads() == 1 else ''}second"
        figures.append(figure(name, rates, "higher", TARGETS[name], unit, about))
    return figures, statistics.median(found[CACHED]) / all_tokens[1] if CACHED in only else None


# ---- packing ----


def tokenizer_only() -> Any:
    """Our processor with SmolLM2's tokenizer, for rows that are planned and not computed."""
    from mmllm.model.chat_template import AUDIO_TOKEN, IMAGE_TOKEN
    from mmllm.model.processor import MMLLMProcessor

    tokenizer: Any = AutoTokenizer.from_pretrained(resolve_model("starter:smollm2-135m-instruct"))
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN, AUDIO_TOKEN]})
    return MMLLMProcessor(tokenizer=tokenizer, image_seq_length=64)


def mixed_records(size: Size) -> list[dict[str, Any]]:
    """Conversations of the starter with as many pictures as ``MIX`` says."""
    source = [as_turns(r) for r in starter_records(size.data, None) if len(record_media(r)) == 1]
    source = source[: size.planned]
    draws = np.random.default_rng(0).choice(list(MIX), len(source), p=list(MIX.values()))
    out = []
    for record, pictures in zip(source, draws):
        first, *rest = record["messages"]
        picture = next(p for p in first["content"] if p["type"] == "image")
        texts = [p for p in first["content"] if p["type"] == "text"]
        out.append({**record, "messages": [{**first, "content": [picture] * int(pictures) + texts}, *rest]})
    return out


def packing_figures(only: Sequence[str], size: Size, per_token: float | None) -> list[Figure]:
    processor = tokenizer_only()
    found = []
    for name, records in (
        ("packing_fill", starter_records(size.data, None)[: size.planned]), ("packing_fill_mixed", mixed_records(size)),
    ):  # fmt: skip
        if not {name, "packing_plan_share"} & set(only):
            continue
        batches = PackedBatches(records, processor, lambda m: {}, len, 1, 0, max_length=ROW, row_length=ROW)
        for index in range(len(records)):
            batches.length(0, index)  # tokenised here, so that the plan alone is timed
        planning = spent(batches.rows_an_epoch)
        rows = batches.rows_an_epoch()
        if name in only:
            note = f"{len(records):,} conversations in {rows:,} rows of {ROW:,} tokens"
            found.append(judged(Figure(name, batches.fill, n=len(records), unit="ratio", note=note)))
        if name == "packing_fill" and "packing_plan_share" in only and per_token:
            plan = planning / (rows * ROW * batches.fill)
            note = f"{1e6 * plan:.3f} of {1e6 * per_token:,.0f} microseconds a token"
            found.append(judged(Figure("packing_plan_share", plan / per_token, "lower", unit="ratio", note=note)))
    return found


# ---- use of the processor ----


def matmul_rate(dtype: torch.dtype) -> float:
    """Operations a second of torch's matmul, the best of several shapes; each for about half a second."""
    best = 0.0
    for m, k, n in ((1040, 576, 1536), (1024, 1024, 1024), (2048, 2048, 2048), (2048, 576, 4096)):
        a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
        torch.mm(a, b)
        end, times = time.perf_counter() + 0.5, []
        while time.perf_counter() < end:
            times.append(spent(lambda: torch.mm(a, b)))  # noqa: B023
        best = max(best, 2 * m * k * n / statistics.median(times))
    return best


def matmul_figure(pairs: int, dtype: torch.dtype, threads: int) -> Figure:
    """The frozen LLM's forward and backward on rows of the starter's shape over the matmul rate, measured in turn."""
    folder = resolve_model("starter:smollm2-135m-instruct")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    model.requires_grad_(False)
    rows, length, asked = 8, 130, 12
    torch.manual_seed(0)
    embeds = model.get_input_embeddings()(torch.randint(0, 49000, (rows, length))).requires_grad_(True)
    at = torch.arange(rows).repeat_interleave(asked), torch.arange(length - asked, length).repeat(rows)
    targets = torch.randint(0, 49000, (rows * asked,))

    def step() -> float:
        embeds.grad = None
        with loss_at_head(model, *at, targets) as found:
            model(inputs_embeds=embeds, use_cache=False)
        assert found.loss is not None
        found.loss.backward()
        return 0.0

    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in model.model.layers.parameters())
    work = 4 * (body * rows * length + head * rows * asked)
    step()
    shares = []
    for _ in range(pairs):
        rate = matmul_rate(dtype)
        shares.append(work / statistics.median(spent(step) for _ in range(3)) / rate)
        print(f"matmul_fraction: {shares[-1]:.3f} of {rate / 1e9:,.0f} GFLOP/s", flush=True)
    name = str(dtype).split(".")[-1]
    note = f"{rows} rows of {length} tokens, weights frozen, {threads} thread{'s' * (threads > 1)}, {name}; goal 0.6"
    shares.sort()
    middle = statistics.median(shares)
    return judged(Figure("matmul_fraction", middle, "higher", shares[0], shares[-1], pairs, "ratio", note=note))


def judged(figure: Figure) -> Figure:
    """With its bar."""
    figure.target = bar = TARGETS[figure.name]
    met = figure.value is not None and (figure.value >= bar if figure.better == "higher" else figure.value <= bar)
    figure.verdict = "met" if met else "missed"
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(TARGETS), default=list(TARGETS), metavar="ROW")
    parser.add_argument("--smoke", action="store_true", help="a tiny tower and few records: does it run at all")
    parser.add_argument("--json")
    args = parser.parse_args()
    threads, size = set_threads(None), SMOKE if args.smoke else Size()
    only, figures, per_token = list(args.only), [], None
    if "packing_plan_share" in only and CACHED not in only:
        parser.error(f"packing_plan_share needs {CACHED}")
    packing = packing_figures  # before the cache moves to the run's own folder
    with tempfile.TemporaryDirectory() as folder:
        cache = os.environ.get("MMLLM_CACHE")
        if {LIVE, CACHED} & set(only):
            figures, per_token = trainer_figures(only, size, args.pairs, Path(folder))
        os.environ.pop("MMLLM_CACHE", None) if cache is None else os.environ.update(MMLLM_CACHE=cache)
    figures += packing(only, size, per_token)
    if "matmul_fraction" in only:
        figures.append(matmul_figure(args.pairs, torch.bfloat16, threads))
    print_figures(figures, f"torch {torch.__version__}, {threads} threads, bfloat16")
    publish(args.json, "python benchmarks/tune_step.py", figures, torch=torch.__version__, threads=threads)


if __name__ == "__main__":
    main()
