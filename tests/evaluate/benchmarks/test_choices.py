"""MMBench, SEED-Bench, ScienceQA and MMVP from files: prompts and figures of canned answers, counted by hand."""

import base64
import json

import pytest

from mmllm.errors import UserError
from mmllm.evaluate.benchmarks.mmbench import rotations

COLUMNS = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "l2-category", "image"]


def write_tsv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join("\t".join(map(str, r)) for r in [COLUMNS, *rows]) + "\n")


@pytest.fixture
def mmbench(tmp_path, make):
    picture = base64.b64encode(make.draw(tmp_path / "x.png").read_bytes()).decode()
    rows = [[0, "What is it?", "It is an animal.", "cat", "dog", "owl", "", "B", "naming", "seeing", picture],
            [1, "Which colour?", "", "red", "blue", "", "", "A", "colour", "seeing", picture]]  # fmt: skip
    write_tsv(tmp_path / "MMBench" / "mmbench_dev_en.tsv", rows)
    return tmp_path


def test_rotations():
    assert rotations({"A": "x", "B": "y", "C": "z"}) == [
        {"A": "x", "B": "y", "C": "z"}, {"A": "y", "B": "z", "C": "x"}, {"A": "z", "B": "x", "C": "y"},
    ]  # fmt: skip


def test_mmbench_circular(mmbench, make):
    right, rows, _ = make.canned("mmbench", mmbench, lambda s: s.gold, scratch=mmbench)
    assert len(rows) == 5 and [r.sample.gold for r in rows] == ["B", "A", "C", "A", "B"]
    assert right["mmbench_circular"].value == right["mmbench_accuracy"].value == 1
    assert right["mmbench_circular"].chance == pytest.approx((1 / 27 + 1 / 4) / 2)
    # Always A: right in one rotation of each question, never in all.
    always = make.canned("mmbench", mmbench, lambda s: "A", scratch=mmbench)[0]
    assert always["mmbench_circular"].value == 0 and always["mmbench_accuracy"].value == 0.5
    # Naming the option's words is right in every rotation.
    words = make.canned("mmbench", mmbench, lambda s: f"It is the {s.meta['options'][s.gold]}", scratch=mmbench)[0]
    assert words["mmbench_circular"].value == words["mmbench_circular_naming"].value == 1


def test_mmbench_official_rotations_are_taken_as_they_are(mmbench, make):
    path = mmbench / "MMBench/mmbench_dev_en.tsv"
    lines = path.read_text().splitlines()
    extra = [1000001, "Which colour?", "", "blue", "red", "", "", "B", "colour", "seeing", "1"]
    path.write_text("\n".join([*lines, "\t".join(map(str, extra))]) + "\n")
    got, rows, _ = make.canned("mmbench", mmbench, lambda s: "A", scratch=mmbench)
    assert [r.sample.id for r in rows] == ["0", "1", "1000001"] and rows[2].sample.media == rows[1].sample.media
    assert got["mmbench_circular"].value == 0 and got["mmbench_circular"].n == 2 and got["mmbench_accuracy"].n == 2


def test_mmbench_prompts_and_hidden_answers(mmbench, make):
    prompts = {s: make.canned("mmbench", mmbench, lambda s: "", s, mmbench)[1][0].prompt
               for s in ("official", "llava", "lmms")}  # fmt: skip
    assert prompts["official"] == ("Hint: It is an animal.\nQuestion: What is it?\nOptions:\nA. cat\nB. dog\nC. owl\n"
                                   "Please select the correct answer from the options above. \n")  # fmt: skip
    letter = "Answer with the option's letter from the given choices directly."
    assert prompts["llava"] == f"It is an animal.\nWhat is it?\nA. cat\nB. dog\nC. owl\n{letter}"
    assert prompts["lmms"] == ("It is an animal. What is it? There are several options:\nA. cat\nB. dog\nC. owl\n"
                               + letter)  # fmt: skip
    write_tsv(mmbench / "MMBench/mmbench_dev_en.tsv", [[0, "q", "", "a", "b", "", "", "", "", "", "xx"]])
    with pytest.raises(UserError, match="no answers"):
        make.canned("mmbench", mmbench, lambda s: "", scratch=mmbench)


def test_seed(tmp_path, make):
    choices = {f"choice_{a}": b for a, b in zip("abcd", "wxyz")}
    questions = [{"question_id": f"q{i}", "question_type_id": 1 + i % 2, "data_id": f"p{i}.jpg", "data_type": kind,
                  "question": "What?", "answer": "B", **choices}
                 for i, kind in enumerate(["image"] * 4 + ["video"])]  # fmt: skip
    make.dump(tmp_path / "SEED-Bench.json", {"questions": questions, "question_type": {"Scene": 1, "Count": 2}})
    for i in range(4):
        make.draw(tmp_path / "SEED-Bench-image" / f"p{i}.jpg")
    got, rows, _ = make.canned("seed", tmp_path, lambda s: "B. x" if s.id in ("q0", "q1", "q2") else "I think B")
    assert len(rows) == 4 and got["seed_accuracy"].value == 0.75 and got["seed_accuracy"].chance == 0.25
    assert got["seed_accuracy_Scene"].value == 1 and got["seed_accuracy_Count"].value == 0.5
    assert rows[0].prompt.startswith("What?\nA. w\nB. x\nC. y\nD. z\nAnswer with the option's letter")
    assert [r.parsed for r in rows] == ["B", "B", "B", None]
    assert make.canned("seed", tmp_path, lambda s: "B. x", "llava")[0]["seed_accuracy"].value == 0


def test_scienceqa(tmp_path, make):
    problems = {str(i): {"question": f"Q{i}?", "choices": ["x", "y", "z"], "answer": i % 3, "hint": "h" if i else "",
                         "image": "image.png" if i < 2 else None, "subject": "s"} for i in range(3)}  # fmt: skip
    make.dump(tmp_path / "ScienceQA/problems.json", problems)
    make.dump(tmp_path / "ScienceQA/pid_splits.json", {"test": ["0", "1", "2"], "train": []})
    for i in range(2):
        make.draw(tmp_path / f"ScienceQA/images/test/{i}/image.png")
    answers = {"0": "A", "1": "The answer is B.", "2": "perhaps"}
    got, rows, bench = make.canned("scienceqa", tmp_path, lambda s: answers[s.id])
    assert got["scienceqa_accuracy"].value == pytest.approx(2 / 3) and got["scienceqa_image_accuracy"].value == 1
    assert rows[1].prompt.startswith("Context: h\nQ1?\nA. x\nB. y\nC. z\nAnswer with")
    assert rows[0].prompt.startswith("Q0?\nA. x")
    assert bench.prompt(rows[2].sample)[0]["content"] == [{"type": "text", "text": rows[2].prompt}]
    official = make.canned("scienceqa", tmp_path, lambda s: answers[s.id], "official")
    assert official[1][0].prompt == "Question: Q0?\nContext: N/A\nOptions: (A) x (B) y (C) z\nAnswer:"
    assert official[0]["scienceqa_accuracy"].value == pytest.approx(1 / 3)
    assert len(bench.control([r.sample for r in rows], 0)) == 2


@pytest.fixture
def mmvp(tmp_path, make):
    lines = ["Index,Question,Options,Correct Answer"]
    for i in range(1, 9):
        lines.append(f"{i},Open or shut?,(a) Open (b) Shut,{'(a)' if i % 2 else '(b)'}")
        make.draw(tmp_path / "MMVP" / "MMVP Images" / f"{i}.jpg")
    (tmp_path / "MMVP" / "Questions.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_mmvp_pairs(mmvp, make):
    right = make.canned("mmvp", mmvp, lambda s: f"({s.gold.lower()})", "lmms")[0]
    assert right["mmvp_pair_accuracy"].value == right["mmvp_accuracy"].value == 1
    same = make.canned("mmvp", mmvp, lambda s: "A", "lmms")[0]
    assert same["mmvp_pair_accuracy"].value == 0 and same["mmvp_accuracy"].value == 0.5
    one = make.canned("mmvp", mmvp, lambda s: s.gold if s.cluster == "0" else "A", "lmms")[0]
    assert one["mmvp_pair_accuracy"].value == 0.25
    # Swapped answers: every hit becomes a miss.
    swapped = make.canned("mmvp", mmvp, lambda s: "B" if s.gold == "A" else "A", "lmms")[0]
    assert swapped["mmvp_accuracy"].value == 0


def test_mmvp_prompts_and_mended_answers(mmvp, make):
    official = make.canned("mmvp", mmvp, lambda s: "it is shut")[1]
    assert official[0].prompt == "Open or shut? (a) Open (b) Shut" and official[0].parsed == "B"
    lmms = make.canned("mmvp", mmvp, lambda s: "", "lmms")[1]
    assert lmms[0].prompt.startswith("Open or shut?\nA. Open\nB. Shut\nAnswer")
    path = mmvp / "MMVP" / "Questions.csv"
    path.write_text(path.read_text().replace("\n1,", "\n99,"))
    make.draw(mmvp / "MMVP/MMVP Images/99.jpg")
    golds = {style: make.canned("mmvp", mmvp, lambda s: "", style)[1][0].sample.gold for style in ("official", "lmms")}
    assert golds == {"official": "A", "lmms": "B"}


def test_scored_style_takes_the_most_probable_choice(mmvp, make):
    _, rows, bench = make.canned("mmvp", mmvp, lambda s: s.gold, "scored", scores=lambda s: [-1.0, -3.0])
    assert bench.style.scored and rows[0].margin == 2 and rows[1].margin == -2
    line = json.loads(json.dumps(rows[0].to_dict("mmvp")))
    assert line["margin"] == 2 and line["parsed"] == "A" and line["unparsed"] is False and line["prompt"]
