"""CHAIR by hand: synonyms, plurals, longest match, repeats, invented words, nothing at all."""

import pytest

from mmllm.evaluate.chair import Vocabulary, chair, score_caption, singular, vocabulary_from

V = Vocabulary(
    {"dog": ["puppy", "hound"], "hot dog": [], "toilet": [], "cherry": [], "grapes": [], "bus": []}, ["toilet seat"]
)


@pytest.mark.parametrize(
    "text, found",
    [
        ("A puppy and two dogs.", ["dog", "dog"]),
        ("a hot dog beside a dog", ["hot dog", "dog"]),
        ("the toilet seat is up", []),
        ("a toilet", ["toilet"]),
        ("cherries, buses and a grape", ["cherry", "bus", "grapes"]),
        ("", []),
    ],
)
def test_mentions(text, found):
    assert V.mentions(text) == found


def test_listed_keeps_what_nobody_knows():
    assert V.listed("a dog, a teapottle, some grapes.") == ["dog", "teapottle", "grapes"]
    assert V.listed("a big red hound and the bus") == ["dog", "bus"]
    assert V.listed("...") == []
    assert Vocabulary(["fish and chips", "dog"]).listed("a dog, fish and chips") == ["dog", "fish and chips"]


@pytest.mark.parametrize(
    "plural, one",
    [("glasses", "glass"), ("bus", "bus"), ("tennis", "tennis"), ("cities", "city"), ("foxes", "fox"), ("tie", "tie")],
)
def test_singular(plural, one):
    assert singular(plural) == one


def test_counts_repeats_and_guards_zero():
    score = score_caption(["dog", "bus", "bus"], ["dog", "cherry"])
    assert (score.mentioned, score.wrong, score.truth, score.covered) == (3, 2, 2, 1)
    empty = score_caption([], ["dog"])
    assert chair([score, empty]) == pytest.approx({"chair_i": 2 / 3, "chair_s": 1 / 2, "recall": 1 / 3})
    assert chair([]) == {"chair_i": 0, "chair_s": 0, "recall": 0}


def test_the_true_caption_has_no_hallucination():
    scenes = [{"boxes": [{"text": "hot dog"}, {"text": "grapes"}]}]
    v = vocabulary_from({"vocabulary": [{"label": "cherry", "synonyms": ["drupe"]}, {"label": "dog"}]}, scenes)
    assert len(v) == 4
    assert chair([score_caption(v.listed("a hot dog, some grapes."), ["hot dog", "grapes"])]) == {
        "chair_i": 0, "chair_s": 0, "recall": 1}  # fmt: skip
    assert v.canonical("drupes") == "cherry" and vocabulary_from(None, scenes).canonical("dog") is None
