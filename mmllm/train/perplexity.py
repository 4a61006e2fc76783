"""Perplexity of the LLM on a fixed text set, before and after a run: what tuning costs it in plain language."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from mmllm.errors import UserError
from mmllm.train.plain_text import TEXTS

BUILT_IN = "built-in"
MOST_TOKENS = 512  # of one text


def read_texts(source: str, folder: Path | None = None) -> list[str]:
    """The texts of ``built-in``, of a text file (parted by empty lines) or of a JSONL file (its field ``text``).

    Args:
        folder: what a file's path is relative to.

    Raises:
        UserError: no such file, no text in it, or a line without the field.
    """
    if source == BUILT_IN:
        return list(TEXTS)
    file = (folder or Path()) / source
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            found = [json.loads(line)["text"].strip() for line in text.splitlines() if line.strip()]
        else:
            found = [part.strip() for part in text.split("\n\n")]
    except OSError:
        raise UserError("no such file", file, f"give perplexity: a text file, or {BUILT_IN}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError("not text in UTF-8, or a line without a field 'text'", file) from None
    found = [t for t in found if t]
    if not found:
        raise UserError("no text in it", file)
    return found


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, texts: list[str]) -> tuple[float, int]:
    """exp of the mean negative log-likelihood of all tokens but each text's first, and how many these are.

    Texts are cut at 512 tokens; the model's mode is as before afterwards.

    Raises:
        UserError: no text has two tokens.
    """
    device = model.get_input_embeddings().weight.device
    modes = [(m, m.training) for m in model.modules() if m.training]
    model.eval()
    total, count = 0.0, 0
    try:
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"][:MOST_TOKENS]], device=device)
            if ids.shape[1] < 2:
                continue
            labels = ids.clone()
            total += float(model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss) * (
                ids.shape[1] - 1
            )
            count += ids.shape[1] - 1
    finally:
        for module, _ in modes:
            module.training = True
    if not count:
        raise UserError("the texts have no two tokens", "perplexity")
    return math.exp(min(total / count, 700.0)), count


class Kept:
    """Measures before and after a run and tells both.

    Args:
        texts: None measures nothing (the LLM is frozen, or the option is off).
    """

    def __init__(self, model: Any, tokenizer: Any, texts: list[str] | None, source: str | None):
        self.model, self.tokenizer, self.texts, self.source = model, tokenizer, texts, source
        self.before = perplexity(model, tokenizer, texts) if texts else None

    def finish(self) -> dict[str, Any]:
        """``{"source", "tokens", "before", "after"}``; empty where nothing was measured."""
        if not self.texts or self.before is None:
            return {}
        after, _ = perplexity(self.model, self.tokenizer, self.texts)
        return {"source": self.source, "tokens": self.before[1], "before": self.before[0], "after": after}


def told(found: dict[str, Any]) -> str:
    """One line for the log."""
    change = found["after"] / found["before"] - 1
    return (
        f"perplexity of the LLM on plain text: {found['before']:.2f} before, {found['after']:.2f} after ({change:+.1%})"
    )


def figures(found: dict[str, Any]) -> list[Any]:
    """The same as figures for ``results.json`` and the report."""
    from mmllm.report.figures import Figure

    note = f"text: {found['source']}"
    made = {"llm_perplexity_before": found["before"], "llm_perplexity_after": found["after"]}
    return [Figure(k, v, better="lower", n=found["tokens"], unit="perplexity", note=note) for k, v in made.items()]
