"""Joins what the quickstart's steps measured into results.json, report.html and the table that it ends with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import yaml

from mmllm.report.figures import Figure, print_figures, read_figures, write_figures
from mmllm.report.html import esc, picture_uri, write_report
from mmllm.report.trace import trace_svg

# What the issue "The quickstart's figures" calls its floors; the full size only.
FLOORS = {
    "retrieval_known_new_vendor_r1": 0.40, "retrieval_new_concept_r1": 0.12, "speech_heldout_voices_r1": 0.65,
    "speech_real_r1": 0.18, "pope_accuracy_seen": 0.86, "pope_accuracy_new_vendor": 0.72, "caption_recall_seen": 0.60,
    "caption_recall_new_vendor": 0.33, "side_accuracy_seen": 0.60, "box_accuracy_iou50": 0.25,
    "interleaved_accuracy": 0.65, "hear_accuracy": 0.55, "wall_seconds": 1200.0, "peak_memory_gb": 6.0,
}  # fmt: skip
GOALS = {  # beyond the floors; docs/starter.md says what was tried where one is not reached
    "retrieval_known_new_vendor_r1": 0.48, "retrieval_new_concept_r1": 0.18, "speech_heldout_voices_r1": 0.75,
    "speech_real_r1": 0.30, "pope_accuracy_seen": 0.92, "pope_accuracy_new_vendor": 0.80, "caption_recall_seen": 0.72,
    "caption_recall_new_vendor": 0.45, "side_accuracy_seen": 0.80, "box_accuracy_iou50": 0.50,
    "interleaved_accuracy": 0.80, "hear_accuracy": 0.75, "wall_seconds": 900.0, "peak_memory_gb": 4.0,
}  # fmt: skip
COMPARED = ("vcd", "ritual")


def headline(figures: list[Figure]) -> list[Figure]:
    """The figures that the table at the end shows: those with a floor, and the areas under the curve."""
    return [f for f in figures if f.name in FLOORS or f.name.startswith("pope_auc")]


def _decoding(out: Path, base: list[Figure]) -> list[Figure]:
    """The POPE figures under other decoding, each beside greedy on the same questions of ``decoding/greedy``."""
    rows = []
    for spec in COMPARED:
        for f in read_figures(out / "decoding" / spec / "results.json"):
            if f.name.startswith(("pope_accuracy_seen", "pope_accuracy_new_vendor")):
                same = next((b.value for b in base if b.name == f.name), None)
                arms = None if same is None else {"greedy": same, spec: f.value}
                rows.append(replace(f, name=f"{f.name}_{spec}", arms=arms, verdict=None))
    return rows


def _losses(out: Path) -> dict[str, Path]:
    files = {stage: out / stage / "metrics.jsonl" for stage in ("align", "pretrain", "tune")}
    return {stage: file for stage, file in files.items() if file.is_file()}


def _traces(out: Path) -> list[tuple[str, str]]:
    """For each compared method, one answer token by token."""
    found = []
    for spec in COMPARED:
        file = out / "decoding" / spec / "trace.json"
        if file.is_file():
            data = json.loads(file.read_text(encoding="utf-8"))
            picture = f'<img src="{picture_uri(data["media"][0])}" alt="">'
            words = f"<p>{esc(data['question'])} Each column is a token of the answer, each block a view.</p>"
            steps = f'<div style="overflow:auto">{trace_svg(data["steps"])}</div>'
            found.append((f"How {spec} decides", picture + words + steps))
    return found


def _serving(out: Path) -> list[Figure]:
    """Figures of the serving check; empty when it was left out."""
    file = out / "serve.json"
    return read_figures(file) if file.is_file() else []


def _served(figures: list[Figure]) -> str:
    parity = next((f for f in figures if f.name == "serve_parity"), None)
    if parity is None or parity.value is None or not parity.n:
        return "not checked"
    return f"{round(parity.value * parity.n)} of {parity.n} answers token for token those of our own greedy decoding"


def summarise(out: Path, size: str, seed: int, wall_seconds: float, peak_memory_gb: float) -> Path:
    """Writes ``results.json`` and ``report.html`` into the quickstart's folder and prints the table.

    Returns:
        The path of the report.
    """
    from mmllm.data.models import resolve_dataset
    from mmllm.evaluate.gallery import gallery_items

    results = json.loads((out / "eval" / "results.json").read_text(encoding="utf-8"))
    figures = read_figures(out / "eval" / "results.json")
    figures += read_figures(out / "align" / "final" / "results.json")  # measured at the end of the align step
    compared = _decoding(out, read_figures(out / "decoding" / "greedy" / "results.json"))
    figures += compared
    figures.append(Figure("wall_seconds", wall_seconds, better="lower", unit="s",
                          note="whole quickstart without downloads and serving check"))  # fmt: skip
    figures.append(Figure("peak_memory_gb", peak_memory_gb, better="lower", unit="GB",
                          note="largest process, serving excluded"))  # fmt: skip
    if size == "full":
        for f in figures:
            if f.name in FLOORS and f.value is not None:
                f.target = FLOORS[f.name]
                met = f.value >= f.target if f.better == "higher" else f.value <= f.target
                f.verdict = "met" if met else "missed"
    serving = _serving(out)
    figures += serving
    command = "mmllm quickstart" + (" --fast" if size == "fast" else "")
    extra = {"missing": results.get("missing", []), "size": size}
    write_figures(out / "results.json", command, seed, None, results.get("sources", []), figures, **extra)

    dataset = resolve_dataset(f"starter:{size}")
    gallery = gallery_items(out / "eval" / "predictions.jsonl", seed=seed)
    picture = next((i.media[0] for i in gallery if i.kind == "image"), "picture.png")
    commands = [
        f'mmllm chat {out / "tune"} -i {picture} -q "What is in the picture?"',
        f"mmllm eval --model {out / 'tune'} --data starter:{size} --tasks pope --decode vcd:alpha=0.5",
        f"mmllm serve {out / 'tune'}",
    ]
    align = yaml.safe_load((out / "align" / "config.yaml").read_text(encoding="utf-8"))
    llm = align["streams"][align["words"]]["tower"]["model"]
    facts = {
        "command": command, "seed": seed, "dataset": str(dataset), "LLM": llm,
        "sources": [s["name"] for s in results.get("sources", [])],
        "sources missing": [m["name"] for m in results.get("missing", [])] or "none",
        "wall time": f"{wall_seconds / 60:.1f} minutes without downloads and serving",
        "served by vLLM": _served(serving),
    }  # fmt: skip
    first = headline(figures)
    shown = {f.name for f in first} | {f.name for f in compared}
    tables = {
        "What it sees and hears": first,
        "How decoding changes it": compared,
        "All other figures": [f for f in figures if f.name not in shown],
    }
    report = write_report(
        out / "report.html", "mmllm quickstart", tables, _losses(out), gallery, facts, commands, _traces(out)
    )
    print_figures(first, "What it sees and hears, on pictures, voices and things it has never met")
    print_figures(compared, "The same yes/no questions, decoded against hallucination")
    if serving:
        print(f"\nserved by vLLM: {facts['served by vLLM']}")
    print(f"\nreport: {report}\nfigures: {out / 'results.json'}\n\nGo on with:")
    for line in commands:
        print(f"  {line}")
    return report
