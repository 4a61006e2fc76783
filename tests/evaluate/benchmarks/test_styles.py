"""What every style of every benchmark makes of typical answers: prompt and rule belong together."""

import pytest

from mmllm import registry
from mmllm.evaluate.benchmarks import OWN, get_benchmark
from mmllm.evaluate.benchmarks.base import Benchmark, Style
from mmllm.evaluate.tasks import Sample
from mmllm.registry import register

OPTIONS = {"A": "cat", "B": "dog"}
YES_NO = Sample("1", "1", [], "Is it?", "yes", ["yes", "no"], meta={"split": "discriminative"})
GIVEN = {"options": OPTIONS, "hint": "", "given": "(a) cat (b) dog"}
LETTERS = Sample("1", "1", [], "What?", "B", ["A", "B"], meta=GIVEN)
SOUND = Sample("1", "1", [], "", "sea waves", ["dog", "sea waves"])
PEOPLE = Sample("1", "1", [], "What?", ["2"] * 9 + ["two"], meta={"ocr": ["x"]})
OPEN = Sample("1", "1", [], "What?", "x")
BOX = Sample("1", "1", [], "cat", [0, 0, 1, 1])

# benchmark, style -> answers and what is made of them.
TABLE = [
    ("pope", "official", YES_NO, {"Yes.": "yes", "No, it is": "no", "There is not": "no", "": "yes"}),
    ("pope", "llava", YES_NO, {"Yes": "yes", "No": "no", "Sure": "yes"}),
    ("pope", "lmms", YES_NO, {"Yes": "yes", "no": "no", "No.": None, "": None}),
    ("pope", "vcd", YES_NO, {"Yes": "yes", "no way": "no"}),
    ("pope", "vlmevalkit", YES_NO, {"Yes.": "yes", "yes or no": None, "Sure": None}),
    ("pope", "scored", YES_NO, {"yes": "yes", "no": "no"}),
    ("pope_aokvqa", "lmms", YES_NO, {"Yes.": None}),
    ("pope_gqa", "official", YES_NO, {"Yes.": "yes"}),
    ("popev2", "lmms", YES_NO, {"YES": "yes"}),
    ("mme", "official", YES_NO, {"Yes, it is": "yes", "No": "no", "y": None, "It is": None}),
    ("mme", "llava", YES_NO, {"yes": "yes", "y": None}),
    ("mme", "lmms", YES_NO, {"y": "yes", "N.": "no"}),
    ("amber", "official", YES_NO, {"Yes": "yes", "yes": None, "No.": None}),
    ("amber", "lmms", YES_NO, {"yes.": "yes", "it is not": "no"}),
    ("hallusion", "official", YES_NO, {"Yes, it is.": "yes", "I cannot say": None}),
    ("hallusion", "llava", YES_NO, {"no": "no"}),
    ("hallusion", "vlmevalkit", YES_NO, {"no, yes": None}),
    ("mmbench", "official", LETTERS, {"B": "B", "(B)": "B", "the dog": "B", "C": None}),
    ("mmbench", "llava", LETTERS, {"B.": "B"}),
    ("mmbench", "lmms", LETTERS, {"cat or dog": None}),
    ("seed", "official", LETTERS, {"B. dog": "B", "(B)": None}),
    ("seed", "llava", LETTERS, {"B": "B", "B. dog": None}),
    ("seed", "lmms", LETTERS, {"B. dog": "B", "b": None}),
    ("scienceqa", "llava", LETTERS, {"B": "B", "B. dog": "B", "The answer is B.": "B", "dog": None}),
    ("scienceqa", "lmms", LETTERS, {"B": "B", "B.": "B", "The answer is B.": None}),
    ("scienceqa", "official", LETTERS, {"B": None, "The answer is B.": "B"}),
    ("mmvp", "official", LETTERS, {"(b)": "B", "a dog": "B", "B": "B"}),
    ("mmvp", "llava", LETTERS, {"(b)": "B"}),
    ("mmvp", "lmms", LETTERS, {"(b)": "B", "the answer is b": "B", "dog": None}),
    ("mmau", "official", LETTERS, {"a dog": "B", "B": None, "cat, dog": None}),
    ("mmau", "lmms", LETTERS, {"(B)": "B", "dog": None}),
    ("esc50", "official", SOUND, {"Sea waves.": "sea waves", "rain": None}),
    ("esc50", "scored", SOUND, {"dog": "dog"}),
    ("imagefolder", "official", SOUND, {"Sea waves.": "sea waves", "rain": None}),
    ("textvqa", "official", PEOPLE, {"Two.": "2"}),
    ("textvqa", "llava", PEOPLE, {"the dog": "dog"}),
    ("textvqa", "lmms", PEOPLE, {"the dog": "dog"}),
    ("vqav2", "official", PEOPLE, {"Two.": "2"}),
    ("vqav2", "llava", PEOPLE, {"dont": "don't"}),
    ("vqav2", "lmms", PEOPLE, {"Two": "2"}),
    ("gqa", "official", OPEN, {"Red.": "red", "T-shirt": "t-shirt"}),
    ("gqa", "llava", OPEN, {"Red.": "red"}),
    ("gqa", "lmms", OPEN, {"T-shirt!": "tshirt"}),
    ("refcoco", "official", BOX, {"[0, 0.5, 1, 0.2]": (0, 0.2, 1, 0.5), "[1, 2, 3, 4]": None}),
    ("refcoco", "llava", BOX, {"here": None}),
    ("refcoco", "lmms", BOX, {"[1, 2, 3, 4]": (1, 2, 3, 4)}),
    ("refcoco+", "mmllm", BOX, {"<box>0,0,999,999</box>": (0, 0, 1, 1), "[0, 0, 1, 1]": None}),
    ("refcocog", "official", BOX, {"[0, 0, 1, 1]": (0, 0, 1, 1)}),
    *[(name, "official", OPEN, {" A dog. ": "A dog."})
      for name in ("chair", "flickr30k", "coco_captions", "clotho", "audiocaps")],
]  # fmt: skip


@pytest.mark.parametrize("name, style, sample, answers", TABLE, ids=[f"{t[0]}-{t[1]}" for t in TABLE])
def test_rules(name, style, sample, answers):
    chosen = get_benchmark(name).pick_style(style)
    assert {a: chosen.parse(a, sample) for a in answers} == answers
    assert chosen.prompt(sample) and chosen.scored == (style == "scored")


def test_the_table_holds_every_benchmark():
    assert {t[0] for t in TABLE} == set(OWN)


def test_a_benchmark_of_your_own(tmp_path, monkeypatch, make):
    monkeypatch.setattr(registry, "_REGISTRY", {k: dict(v) for k, v in registry._REGISTRY.items()})

    @register("benchmark", "mine")
    class Mine(Benchmark):
        name, layout, source = "mine", "mine.json", "here"
        styles = {"official": Style(lambda s: s.question, lambda text, s: text.strip().lower())}

        def read(self):
            return [Sample("1", "1", [], "Which?", "cat"), Sample("2", "2", [], "Which?", "dog")]

        def aggregate(self, rows):
            from mmllm.evaluate.benchmarks.scores import accuracy_figures

            return accuracy_figures("mine", rows, self.seed)

    assert make.canned("mine", tmp_path, lambda s: " Cat")[0]["mine_accuracy"].value == 0.5
