"""`mmllm decode trace`: one answer taken apart, as a table in the terminal, as JSON, or as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmllm.decode.spec import DecodeSpec


def trace_run(
    run: Path,
    images: Sequence[Path],
    sounds: Sequence[Path],
    question: str,
    spec: DecodeSpec,
    max_new_tokens: int = 16,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """The steps of a trained model's answer, as ``mmllm.decode.trace.step_table`` gives them."""
    from mmllm.decode import Decoder
    from mmllm.decode.trace import trace_request
    from mmllm.model import load_model
    from mmllm.starter.chat import Chat

    chat = Chat(Decoder(*load_model(run, device="auto")), spec, max_new_tokens, seed)
    for path in images:
        chat.show("image", path)
    for path in sounds:
        chat.show("audio", path)
    return trace_request(chat.decoder, chat.request(question))


def print_trace(steps: Sequence[dict[str, Any]]) -> None:
    """A table: one block a token, one line a view."""
    from mmllm.report.figures import print_table

    def best(entries: list[dict[str, Any]]) -> str:
        return "  ".join(f"{e['token']!r} {e['p']:.2f}" for e in entries)

    rows = []
    for step in steps:
        rows += [("", name, best(entries), "") for name, entries in step["views"].items()]
        rows.append((repr(step["token"]), "mix", best(step["mix"]), str(step["plausible"])))
    print_table(("token", "view", "best tokens", "plausible"), rows)


def write_trace(path: Path, steps: Sequence[dict[str, Any]], spec: DecodeSpec, question: str) -> None:
    """FILE.json with the steps, or FILE.html with their picture."""
    if path.suffix == ".json":
        found = {"decode": str(spec), "program": spec.to_dict(expand=True), "question": question, "steps": list(steps)}
        path.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        return
    from mmllm.report.html import page
    from mmllm.report.trace import trace_svg

    path.write_text(page(f"{question} ({spec})", [("Token by token", trace_svg(steps))]), encoding="utf-8")
