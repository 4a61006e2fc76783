"""Multiple choice as several benchmarks ask it: options under letters, and the letter that an answer stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mmllm.evaluate.benchmarks import parsers
from mmllm.evaluate.benchmarks.base import LETTER, LETTERS, Style
from mmllm.evaluate.tasks import Sample


def lettered(options: Sequence[str]) -> dict[str, str]:
    """["cat", "dog"] -> {"A": "cat", "B": "dog"}."""
    return dict(zip(LETTERS, map(str, options)))


def option_lines(options: Mapping[str, str]) -> str:
    """One line ``A. cat`` per option."""
    return "\n".join(f"{letter}. {words}" for letter, words in options.items())


def options_of(sample: Sample) -> dict[str, str]:
    return sample.meta["options"]


def letter_prompt(sample: Sample) -> str:
    """LLaVA's form: hint, question, options as lines, and the request for a letter; an empty hint takes no line."""
    hint = sample.meta.get("hint")
    return f"{hint}\n{_asked(sample)}" if hint else _asked(sample)


def _asked(sample: Sample) -> str:
    return f"{sample.question}\n{option_lines(options_of(sample))}{LETTER}"


def by_letters(rule: Callable[[str, Sequence[str]], str | None]) -> Callable[[str, Sample], str | None]:
    """A rule on the letters of a sample."""
    return lambda text, sample: rule(text, list(options_of(sample)))


def by_options(text: str, sample: Sample) -> str | None:
    """VLMEvalKit's rule, which looks at the options' words too."""
    return parsers.letter_inferred(text, options_of(sample))


def letter_style(rule: Callable[[str, Sequence[str]], str | None], tokens: int = 16, note: str | None = None) -> Style:
    """LLaVA's prompt with one of the rules for letters."""
    return Style(letter_prompt, by_letters(rule), tokens, note=note)
