"""CIDEr-D (Vedantam et al. 2015, arXiv 1411.5726) as the COCO caption evaluation computes it, and its tokens."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

N = 4
SIGMA = 6.0
Counts = Counter[tuple[str, ...]]
_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))\b")
_TOKEN = re.compile(r"n't\b|'(?:s|re|ve|ll|d|m)\b|[^\W_]+(?:[-./:&'][^\W_]+)*|[$%&@#*+=]")


def tokens(text: str) -> str:
    """Lower-case tokens joined by spaces, without punctuation: close to the Penn Treebank tokens that COCO uses.

    The original is a Java program; on unusual text (abbreviations, money) it cuts otherwise, and scores move a little.
    """
    text = _CLITIC.sub(r" \1", text.lower().replace("’", "'"))
    return " ".join(_TOKEN.findall(text))


def ngrams(sentence: str) -> Counts:
    """All n-grams of 1 to 4 tokens, with their counts."""
    words = sentence.split()
    return Counter(tuple(words[i : i + n]) for n in range(1, N + 1) for i in range(len(words) - n + 1))


class _Vector:
    """TF-IDF weights by n, their norms, and the length in bigrams, as the original takes it."""

    def __init__(self, counts: Counts, document_frequency: Counts, log_documents: float):
        self.weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(N)]
        for gram, count in counts.items():
            idf = log_documents - math.log(max(1.0, document_frequency[gram]))
            self.weights[len(gram) - 1][gram] = count * idf
        self.norms = [math.sqrt(sum(w * w for w in each.values())) for each in self.weights]
        self.length = sum(c for gram, c in counts.items() if len(gram) == 2)

    def similarity(self, reference: _Vector) -> float:
        """Mean over n of the clipped cosine, with the Gaussian penalty on the difference of lengths."""
        total = 0.0
        for mine, other, a, b in zip(self.weights, reference.weights, self.norms, reference.norms, strict=True):
            dot = sum(min(w, other.get(gram, 0.0)) * other.get(gram, 0.0) for gram, w in mine.items())
            total += dot / (a * b) if a and b else 0.0
        return total / N * math.exp(-((self.length - reference.length) ** 2) / (2 * SIGMA**2))


def cider_d(
    captions: Sequence[str], references: Sequence[Sequence[str]], corpus: Sequence[Sequence[str]] | None = None
) -> list[float]:
    """CIDEr-D of each caption, 0 to 10; papers print 100 times the mean.

    Args:
        captions: one per item, tokens joined by spaces.
        references: of each item, in the same form.
        corpus: references that the document frequencies come from; default, ``references``. With one item all weights
            are log(1) = 0 and so is the score.
    """
    documents = references if corpus is None else corpus
    frequency: Counts = Counter()
    for refs in documents:
        frequency.update({gram for ref in refs for gram in ngrams(ref)})
    log_documents = math.log(len(documents)) if documents else 0.0
    scores = []
    for caption, refs in zip(captions, references, strict=True):
        mine = _Vector(ngrams(caption), frequency, log_documents)
        each = [mine.similarity(_Vector(ngrams(r), frequency, log_documents)) for r in refs]
        scores.append(10 * sum(each) / len(each) if each else 0.0)
    return scores
