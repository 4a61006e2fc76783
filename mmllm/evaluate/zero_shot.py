"""Zero-shot classification: classes named by prompts, each class the mean of its prompts' embeddings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from torch import Tensor

from mmllm.contracts import Scorer
from mmllm.errors import UserError
from mmllm.evaluate.retrieval import class_embeddings

TEMPLATES = ("a kind of {}",)


def class_prompts(classes: Sequence[str], templates: Sequence[str] = TEMPLATES) -> list[list[str]]:
    """Every class in every template, [C][T].

    Raises:
        UserError: fewer than two classes, a class given twice, or a template without a place for the class.
    """
    twice = sorted(name for name, count in Counter(c.strip() for c in classes).items() if count > 1)
    if twice:
        raise UserError(f"the class list has duplicates: {', '.join(twice[:5])}", do="name each class once")
    if len(classes) < 2:
        raise UserError("zero-shot classification needs at least two classes")
    wrong = [t for t in templates if t.count("{}") != 1]
    if wrong or not templates:
        what = f"template '{wrong[0]}' has no place for the class" if wrong else "no templates"
        raise UserError(what, do="write e.g. 'a photo of a {}'")
    return [[t.replace("{}", c) for t in templates] for c in classes]


def embed_classes(
    embed: Callable[[list[str]], Tensor], classes: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Tensor:
    """[C, D] unit vectors: the mean of each class's prompt embeddings, each made unit first (CLIP, arXiv 2103.00020).

    Args:
        embed: texts -> [N, D].
    """
    prompts = class_prompts(classes, templates)
    rows = embed([p for group in prompts for p in group])
    return class_embeddings(rows.view(len(classes), len(templates), -1))


def classify(query: Tensor, classes: Tensor, scorer: Scorer | None = None) -> tuple[Tensor, Tensor]:
    """(scores [Q, C], class [Q]) of embeddings [Q, D] against class embeddings [C, D]."""
    scores = (Scorer() if scorer is None else scorer).score(query, classes)
    return scores, scores.argmax(1)
