"""From the words of an answer to yes or no, a letter, a number, a name or a box; None where a rule cannot tell."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?|\b(?:" + "|".join(NUMBER_WORDS) + r")\b", re.IGNORECASE)
_BOX = re.compile(r"[\[(]\s*" + r"\s*,\s*".join([r"(-?\d+(?:\.\d*)?|-?\.\d+)"] * 4) + r"\s*[\])]")
# What may stand around a letter that is meant as a choice, tried in this order.
LETTER_MARKS = (
    ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."), (":", ""), (":", ","), (":", "."),
    (":", ")"), (":", ")."),
)  # fmt: skip


def yes_no_official(text: str) -> str:
    """The rule of the POPE authors, which LLaVA uses too: it never admits doubt.

    Of the first sentence, commas dropped, a word No, no or not means no; anything else is yes, even nothing at all.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def yes_no_exact(text: str) -> str | None:
    """A bare yes or no in any case, without a full stop, as lmms-eval compares it."""
    bare = text.lower().strip()
    return bare if bare in ("yes", "no") else None


def yes_no_word(text: str) -> str | None:
    """Exactly one of the words yes and no, as VLMEvalKit extracts it."""
    found = {w for w in re.findall(r"[a-z']+", text.lower()) if w in ("yes", "no")}
    return found.pop() if len(found) == 1 else None


def yes_no_prefix(text: str) -> str | None:
    """The rule of the MME authors: yes, else no, within the first four characters, in any case."""
    start = text.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def yes_no_start(text: str) -> str | None:
    """lmms-eval's rule for MME: as the authors', full stops dropped, and a single y or n counts too."""
    bare = text.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(bare) or yes_no_prefix(bare)


def yes_no_capital(text: str) -> str | None:
    """The rule of the AMBER authors: the answer is exactly ``Yes`` or ``No``."""
    return text.lower() if text in ("Yes", "No") else None


def yes_no_contains(text: str) -> str | None:
    """lmms-eval's rule for AMBER: contains yes, else contains no (so that "not" and "nothing" are no)."""
    low = text.lower()
    return "yes" if "yes" in low else "no" if "no" in low else None


def letter_first(text: str, letters: Sequence[str]) -> str | None:
    """lmms-eval's rule for SEED-Bench: the first character."""
    first = text.strip()[:1]
    return first if first in letters else None


def letter_alone(text: str, letters: Sequence[str]) -> str | None:
    """LLaVA's rule for SEED-Bench: nothing but the letter."""
    return text if text in letters else None


def letter_llava(text: str, letters: Sequence[str]) -> str | None:
    """LLaVA's rule for ScienceQA: the letter alone, ``X. ...`` at the start, or ``The answer is X``."""
    text = text.replace("\n", ". ")
    if text.strip() in letters:
        return text.strip()
    if text[:1] in letters and text[1:3] == ". ":
        return text[0]
    match = re.search(r"The answer is ([A-Z])", text)
    return match.group(1) if match and match.group(1) in letters else None


def letter_said(text: str, letters: Sequence[str]) -> str | None:
    """The rule of the ScienceQA authors: exactly one ``The answer is X.``."""
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 and found[0] in letters else None


def letter_dot(text: str, letters: Sequence[str]) -> str | None:
    """lmms-eval's rule for ScienceQA: the letter alone, or the letter and a full stop at the start."""
    if text in letters:
        return text
    return text[0] if text[1:2] == "." and text[0] in letters else None


def letter_inferred(text: str, options: Mapping[str, str]) -> str | None:
    """VLMEvalKit's rule without a judge: one free-standing or marked letter, else the one option whose words appear.

    An "A" in an answer of more than three words may be an article and does not count by itself.

    Args:
        options: letter -> words of the option.
    """
    tokens = text.split()
    bare = [x for x in options if x in tokens]
    if len(bare) == 1 and not ("A" in tokens and len(tokens) > 3):
        return bare[0]
    for before, after in LETTER_MARKS:
        marked = [x for x in options if f"{before}{x}{after}" in tokens]
        if len(marked) == 1:
            return marked[0]
    low = text.lower()
    named = [x for x, words in options.items() if words and str(words).lower() in low]
    return named[0] if len(named) == 1 else None


def letter_pattern(text: str, letters: Sequence[str]) -> str | None:
    """lmms-eval's rule for MMVP: alone, at the start, "answer is X", "option X", any free-standing one; any case."""
    one = f"([{''.join(letters)}])"
    patterns = (rf"^\(?{one}\)?\.?$", rf"^\(?{one}\)?[.\s]", rf"answer\s+is\s+\(?{one}\)?", rf"option\s+\(?{one}\)?",
                rf"\(?{one}\)?(?:\s|$)")  # fmt: skip
    for pattern in patterns:
        match = re.search(pattern, text.strip(), re.IGNORECASE)
        if match:
            return match.group(1).upper()
    return letter_first(text.upper(), letters)


def letter_marked(text: str, letters: Sequence[str]) -> str | None:
    """lmms-eval's rule for MMAU, without its random guess: ``(X)``, else `` X ``, else ``X.``; of several the last."""
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    for form in ("({})", " {} ", "{}."):
        found = [x for x in letters if form.format(x) in text]
        if found:
            return max(found, key=lambda x: text.rfind(f" {x} ")) if len(found) > 1 else found[0]
    return None


def words_of_option(text: str, options: Sequence[str]) -> str | None:
    """The rule of the MMAU authors: all words of one option appear, and no word that only the others have."""

    def words(phrase: str) -> set[str]:
        return set(re.findall(r"\b\w+\b", phrase.lower()))

    said = words(text)
    for option in options:
        own = words(option)
        others = {w for x in options if words(x) != own for w in words(x) - own}
        if said and own <= said and not said & others:
            return option
    return None


def name_in(text: str, names: Sequence[str]) -> str | None:
    """The one of ``names`` that appears as words (underscores are spaces); of nested ones the longest, of two none."""
    low = " ".join(re.findall(r"\w+", text.lower().replace("_", " ")))
    found = [n for n in names if re.search(rf"\b{re.escape(_spaced(n))}\b", low)]
    whole = [n for n in found if not any(n != m and _spaced(n) in _spaced(m) for m in found)]
    return whole[0] if len(whole) == 1 else None


def _spaced(name: str) -> str:
    return " ".join(re.findall(r"\w+", name.lower().replace("_", " ")))


def number(text: str) -> float | None:
    """The first number, in digits (with thousands commas) or as a word up to twelve."""
    match = _NUMBER.search(text)
    if not match:
        return None
    word = match.group().lower()
    return float(NUMBER_WORDS.index(word)) if word in NUMBER_WORDS else float(word.replace(",", ""))


def four_numbers(text: str) -> tuple[float, float, float, float] | None:
    """The first ``[a, b, c, d]`` or ``(a, b, c, d)`` of numbers."""
    match = _BOX.search(text)
    return tuple(float(x) for x in match.groups()) if match else None  # type: ignore[return-value]


def bare_answer(text: str) -> str:
    """Lower case, without white space and full stop at the ends."""
    return text.strip().strip(".").strip().lower()
