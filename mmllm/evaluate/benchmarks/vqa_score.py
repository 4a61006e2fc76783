"""VQA accuracy: the two normalisations of answers that are in use, and the soft score against ten people's answers."""

from __future__ import annotations

import re
from collections.abc import Sequence

ARTICLES = ("a", "an", "the")
DIGITS = {w: str(i) for i, w in enumerate("zero one two three four five six seven eight nine ten".split())}
DIGITS["none"] = "0"
PUNCTUATION = tuple(";/[]\"{}()=+\\_-><@`,?!")
_COMMA = re.compile(r"(\d)(,)(\d)")
_STOP = re.compile(r"\.(?!\d)")
_SINGLE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm I've
isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll they're they've
'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll who's who've
why'll why're why's won't would've wouldn't y'all you'd you'll you're you've somebody'll somebody's
"""
_DOUBLE = """
'ow's'at couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've someone'd've something'd've
there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've
"""


def _contractions() -> dict[str, str]:
    """Contractions whose apostrophe was left out; of those with several, each form that lacks exactly one."""
    out = {w.replace("'", ""): w for w in _SINGLE.split()}
    for word in _DOUBLE.split():
        places = [i for i, c in enumerate(word) if c == "'"]
        out |= {word[:i] + word[i + 1 :]: word for i in places}
    # The published table takes the apostrophe out of these instead.
    out |= {"somebody'd": "somebodyd", "somebodyd've": "somebody'd've", "somebody'dve": "somebody'd've"}
    return out


CONTRACTIONS = _contractions()


def without_punctuation(text: str) -> str:
    """Marks next to a space (or anywhere in a text with 1,000) vanish, other marks become spaces.

    A full stop goes unless a digit follows.
    """
    out = text
    for mark in PUNCTUATION:
        gone = f"{mark} " in text or f" {mark}" in text or _COMMA.search(text)
        out = out.replace(mark, "" if gone else " ")
    return _STOP.sub("", out)


def without_articles(text: str) -> str:
    """Lower case, number words as digits, no articles, contractions with their apostrophe."""
    kept = [w for w in (DIGITS.get(x, x) for x in text.lower().split()) if w not in ARTICLES]
    return " ".join(CONTRACTIONS.get(w, w) for w in kept)


def official_answer(text: str, people: Sequence[str]) -> str:
    """An answer, of the model or of people, as the script of VQA normalises it: not at all where all people agree."""
    text = _one_line(text)
    return text if len({_one_line(p) for p in people}) == 1 else without_articles(without_punctuation(text))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def evalai_answer(text: str) -> str:
    """An answer, of the model or of people, as the EvalAI script normalises it; LLaVA and lmms-eval use this one."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return without_articles(without_punctuation(_one_line(text)))


def soft_score(answer: str, people: Sequence[str]) -> float:
    """Mean over the people of min(1, matching answers among the others / 3) (Antol et al. 2015, arXiv 1505.00468)."""
    matches = sum(p == answer for p in people)
    each = [min(1.0, (matches - (p == answer)) / 3) for p in people]
    return sum(each) / len(each) if each else 0.0


def official_score(answer: str, people: Sequence[str]) -> float:
    """The soft score with the official normalisation of both sides.

    Args:
        answer: raw answer of the model. people: raw answers.
    """
    return soft_score(official_answer(answer, people), [official_answer(p, people) for p in people])


def evalai_score(answer: str, people: Sequence[str]) -> float:
    """The soft score with the EvalAI normalisation of both sides."""
    return soft_score(evalai_answer(answer), [evalai_answer(p) for p in people])
