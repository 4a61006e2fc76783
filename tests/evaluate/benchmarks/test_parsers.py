"""Tables of answers: what each rule makes of them."""

import pytest

from mmllm.evaluate.benchmarks import parsers


@pytest.mark.parametrize(
    "text, official, exact, word, prefix, capital, contains",
    [
        ("yes", "yes", "yes", "yes", "yes", None, "yes"),
        ("Yes", "yes", "yes", "yes", "yes", "yes", "yes"),
        (" No ", "no", "no", "no", "no", None, "no"),
        ("No.", "no", None, "no", "no", None, "no"),
        ("No", "no", "no", "no", "no", "no", "no"),
        ("no, there is not", "no", None, "no", "no", None, "no"),
        ("Yes, there is no doubt", "no", None, None, "yes", None, "yes"),
        ("It is snowing", "yes", None, None, None, None, "no"),
        ("There is a cat. No dog", "yes", None, "no", None, None, "no"),
        ("nothing", "yes", None, None, "no", None, "no"),
        ("Sure", "yes", None, None, None, None, None),
        ("", "yes", None, None, None, None, None),
    ],
)
def test_yes_and_no(text, official, exact, word, prefix, capital, contains):
    rules = (parsers.yes_no_official, parsers.yes_no_exact, parsers.yes_no_word, parsers.yes_no_prefix,
             parsers.yes_no_capital, parsers.yes_no_contains)  # fmt: skip
    assert [rule(text) for rule in rules] == [official, exact, word, prefix, capital, contains]


@pytest.mark.parametrize(
    "text, first, llava, said, dot, pattern, marked",
    [
        ("B", "B", "B", None, "B", "B", "B"),
        ("b", None, None, None, None, "B", None),
        ("B.", "B", None, None, "B", "B", "B"),
        ("B. a dog", "B", "B", None, "B", "B", "B"),
        ("B\nbecause", "B", "B", None, None, "B", None),
        ("(B)", None, None, None, None, "B", "B"),
        ("The answer is C.", None, "C", "C", None, "C", "C"),
        ("The answer is C", None, "C", None, None, "C", "C"),
        ("I choose option D", None, None, None, None, "D", "D"),
        ("Because it is green", "B", None, None, None, "B", None),
        ("A or B", "A", None, None, None, "A", "B"),
        ("E", None, None, None, None, None, None),
        ("", None, None, None, None, None, None),
    ],
)
def test_letters(text, first, llava, said, dot, pattern, marked):
    rules = (parsers.letter_first, parsers.letter_llava, parsers.letter_said, parsers.letter_dot,
             parsers.letter_pattern, parsers.letter_marked)  # fmt: skip
    assert [rule(text, list("ABCD")) for rule in rules] == [first, llava, said, dot, pattern, marked]


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B) dog", "B"),
        ("The answer is B.", "B"),
        ("A red dog", "A"),  # three words: the letter counts
        ("A big red dog", "B"),  # an article, so the words of the option decide
        ("a dog", "B"),
        ("cat or dog", None),
        ("A and B", None),
        ("D", None),
        ("", None),
    ],
)
def test_letters_inferred_from_options(text, letter):
    assert parsers.letter_inferred(text, {"A": "cat", "B": "Dog", "C": "owl"}) == letter


@pytest.mark.parametrize(
    "text, option",
    [
        ("Man", "Man"),
        ("a man is speaking", "Man"),
        ("a woman, not a man", None),
        ("", None),
        ("violin", None),
        ("the blue one", "blue"),
        ("dark blue", "dark blue"),
    ],
)
def test_words_of_an_option(text, option):
    choices = ["Man", "Woman"] if "man" in text.lower() or not text else ["blue", "dark blue", "violins"]
    assert parsers.words_of_option(text, choices) == option


def test_names_in_text():
    names = ["dog", "hot dog", "sea_waves", "cat"]
    assert parsers.name_in("I hear a DOG.", names) == "dog"
    assert parsers.name_in("a hot dog", names) == "hot dog"
    assert parsers.name_in("Sea waves!", names) == "sea_waves"
    assert parsers.name_in("a dog and a cat", names) is None
    assert parsers.name_in("hotdogs", names) is None


@pytest.mark.parametrize(
    "text, value",
    [("3", 3), ("There are two cats", 2), ("1,234.5 m", 1234.5), ("-7 degrees", -7), ("none", None), ("", None),
     ("someone", None), ("Twelve", 12), ("2 of three", 2)],
)  # fmt: skip
def test_numbers(text, value):
    assert parsers.number(text) == value


@pytest.mark.parametrize(
    "text, box",
    [
        ("[0.1, 0.2, 0.3, 0.4]", (0.1, 0.2, 0.3, 0.4)),
        ("at (1,2,3,4).", (1, 2, 3, 4)),
        ("[.5, 1., -3, 4]", (0.5, 1, -3, 4)),
        ("[0.1, 0.2, 0.3]", None),
        ("0.1, 0.2, 0.3, 0.4", None),
        ("", None),
    ],
)
def test_boxes(text, box):
    assert parsers.four_numbers(text) == box


def test_bare_answers():
    assert [parsers.bare_answer(x) for x in (" Red. ", "red", "Mr. X.", "")] == ["red", "red", "mr. x", ""]


@pytest.mark.parametrize(
    "text, answer",
    [("Y", "yes"), ("n.", "no"), ("Yes.", "yes"), ("N.o", "no"), ("not", "no"), ("maybe", None), ("", None)],
)
def test_the_start_of_yes_and_no(text, answer):
    assert parsers.yes_no_start(text) == answer


def test_a_letter_alone():
    assert [parsers.letter_alone(x, ["A", "B"]) for x in ("A", "B", "A.", "C", "")] == ["A", "B", None, None, None]
