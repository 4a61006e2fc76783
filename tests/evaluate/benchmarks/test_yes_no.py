"""POPE, POPEv2 and MME from files: prompts and figures of canned answers, counted by hand."""

import numpy as np
import pytest

from mmllm.errors import UserError

QUESTIONS = [("cat", "yes"), ("dog", "no"), ("owl", "yes"), ("fox", "no")]


@pytest.fixture
def pope(tmp_path, make):
    for kind in ("random", "popular"):
        rows = [{"question_id": i + 1, "image": f"COCO_val2014_{i // 2}.jpg", "label": label,
                 "text": f"Is there a {thing} in the image?"}
                for i, (thing, label) in enumerate(QUESTIONS)]  # fmt: skip
        make.dump_lines(tmp_path / "POPE" / "coco" / f"coco_pope_{kind}.json", rows)
    for i in range(2):
        make.draw(tmp_path / "POPE" / "val2014" / f"COCO_val2014_{i}.jpg")
    return tmp_path


def test_pope_prompts_of_all_styles(pope, make):
    tails = {"official": "", "llava": "\nAnswer the question using a single word or phrase.",
             "lmms": "\nAnswer the question using a single word or phrase.",
             "vcd": " Please answer this question with one word.", "vlmevalkit": ""}  # fmt: skip
    for style, tail in tails.items():
        rows = make.canned("pope", pope, lambda s: "yes", style)[1]
        assert rows[0].prompt == "Is there a cat in the image?" + tail


def test_pope_figures_by_hand(pope, make):
    """Yes to all but the fox: 2 true yes, 1 false yes, 1 true no."""
    got, rows, bench = make.canned("pope", pope, lambda s: "No" if "fox" in s.question else "Yes, I see it", "llava")
    assert len(rows) == 8 and {r.sample.meta["split"] for r in rows} == {"random", "popular"}
    assert got["pope_random_accuracy"].value == 3 / 4 and got["pope_random_precision"].value == pytest.approx(2 / 3)
    assert got["pope_random_recall"].value == 1 and got["pope_popular_f1"].value == pytest.approx(4 / 5)
    assert got["pope_random_yes_ratio"].value == 3 / 4 and "pope_random_auc" not in got
    assert bench.prompt(rows[0].sample)[0]["content"][0]["type"] == "image"


@pytest.mark.parametrize("word, expected", [("yes", (0.5, 0.5, 1, 2 / 3, 1)), ("no", (0.5, 0, 0, 0, 0))])
def test_pope_of_one_answer_always(pope, make, word, expected):
    got = make.canned("pope", pope, lambda s: word, "lmms")[0]
    names = ("accuracy", "precision", "recall", "f1", "yes_ratio")
    assert tuple(got[f"pope_random_{n}"].value for n in names) == pytest.approx(expected)


def test_pope_unparsed_answers_and_the_two_recalls(pope, make):
    """A "yes." is nothing to lmms-eval, whose recall leaves it out; for VLMEvalKit's rule "sure" is a missed yes."""
    answers = {"cat": "yes", "dog": "no", "owl": "sure", "fox": "no"}

    def say(s):
        return next(a for t, a in answers.items() if t in s.question)

    lmms, strict = (make.canned("pope", pope, say, style)[0] for style in ("lmms", "vlmevalkit"))
    assert lmms["pope_random_recall"].value == 1 and strict["pope_random_recall"].value == 0.5
    assert lmms["pope_random_f1"].value == 1 and strict["pope_random_f1"].value == pytest.approx(2 / 3)
    assert lmms["pope_random_accuracy"].value == strict["pope_random_accuracy"].value == 0.75


def counted_as_lmms_does(pairs):
    """Accuracy, precision, recall and F1 as lmms-eval counts them: over (said, true), said lower-cased and stripped."""
    pairs = [(said.lower().strip(), true) for said, true in pairs]
    hits = sum(said == true for said, true in pairs)
    true_positives, false_positives = pairs.count(("yes", "yes")), pairs.count(("yes", "no"))
    false_negatives = pairs.count(("no", "yes"))
    precision = true_positives / max(true_positives + false_positives, 1)
    recall = true_positives / max(true_positives + false_negatives, 1)
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0
    return hits / len(pairs), precision, recall, f1


@pytest.mark.parametrize("seed", range(4))
def test_pope_equals_lmms_eval_on_the_same_answers(tmp_path, make, seed):
    rng = np.random.default_rng(seed)
    rows = [{"question_id": i, "image": "0.png", "text": f"Is there a {i}?", "label": str(rng.choice(["yes", "no"]))}
            for i in range(40)]  # fmt: skip
    make.dump_lines(tmp_path / "coco_pope_random.json", rows)
    make.draw(tmp_path / "0.png")
    said = {str(i): str(rng.choice(["yes", "Yes ", "no", "NO", "No.", "yes, it is", "maybe", ""])) for i in range(40)}
    got = make.canned("pope", tmp_path, lambda s: said[s.id], "lmms")[0]
    expected = counted_as_lmms_does([(said[str(r["question_id"])], r["label"]) for r in rows])
    names = ("accuracy", "precision", "recall", "f1")
    assert tuple(got[f"pope_random_{n}"].value for n in names) == pytest.approx(expected)


def test_pope_auc_ignores_a_leaning(pope, make):
    def scores(s):
        return [-5.0, -1.0] if s.gold == "no" else [-3.0, -1.0]

    got = make.canned("pope", pope, lambda s: "no", scores=scores)[0]
    assert got["pope_random_auc"].value == 1 and got["pope_random_accuracy"].value == 0.5


def test_pope_control_stands_beside(pope, make):
    got = make.canned("pope", pope, lambda s: s.gold, "lmms", control=lambda s: "yes")[0]
    assert (got["pope_random_accuracy"].value, got["pope_random_accuracy"].control) == (1, 0.5)
    assert got["pope_random_accuracy_over_shuffled"].value == 0.5


def test_pope_missing_files_and_pictures(pope, tmp_path, make):
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no coco_pope_random.json here; expected: .* get it from github.com/AoiDragon"):
        make.canned("pope", tmp_path / "none", lambda s: "")
    (pope / "POPE/val2014/COCO_val2014_1.jpg").unlink()
    with pytest.raises(UserError, match="COCO_val2014_1.jpg: pope: 1 files of its media are not there; expected"):
        make.canned("pope", pope, lambda s: "")
    with pytest.raises(UserError, match="did you mean 'llava'"):
        make.canned("pope", pope, lambda s: "", "lava")
    with pytest.raises(UserError, match="no such data folder"):
        make.canned("pope", pope / "gone", lambda s: "")


def test_pope_ids_that_stand_twice(pope, make):
    path = pope / "POPE/coco/coco_pope_random.json"
    path.write_text(path.read_text() * 2)
    with pytest.raises(UserError, match="4 ids stand there twice, such as 1"):
        make.canned("pope", pope, lambda s: "")


def test_popev2_pairs(tmp_path, make):
    rows = []
    for i in range(4):
        for label, side in (("yes", "original"), ("no", "removed")):
            name = f"/coco/train2017/{i}.png" if side == "original" else f"/images/{i}.png"
            make.draw(tmp_path / (name[1:] if side == "original" else f"POPEv2{name}"))
            asked = {"target_object": "cat", "query": "Is there a cat in the image?"}
            rows.append({"image_id": i, "image_name": name, "label": label.capitalize(), **asked})
    make.dump(tmp_path / "POPEv2/dataset/annotations.json", rows)
    got = make.canned("popev2", tmp_path, lambda s: "yes" if s.cluster != "0" else s.gold, "lmms")[0]
    assert got["popev2_pair_accuracy"].value == 0.25 and got["popev2_pair_accuracy"].chance == 0.25
    assert got["popev2_accuracy"].value == 5 / 8


def test_popev2_parquet(tmp_path, make):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    picture = {"bytes": make.draw(tmp_path / "x.png").read_bytes(), "path": "x.png"}
    other = {"bytes": make.draw(tmp_path / "y.png").read_bytes(), "path": "y.png"}
    row = {"normal_image": picture, "counterfactual_image": other, "question": "Is there a cat?", "normal_label": "yes",
           "counterfactual_label": "no", "image_id": "7", "example_id": "e0", "target_object": "cat"}  # fmt: skip
    (tmp_path / "popev2").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "popev2" / "test.parquet")
    got, rows, _ = make.canned("popev2", tmp_path, lambda s: s.gold, "lmms", scratch=tmp_path / "out")
    assert got["popev2_pair_accuracy"].value == 1 and len({r.sample.media[0] for r in rows}) == 2


@pytest.fixture
def mme(tmp_path, make):
    ask = "Is there a {} in this image? Please answer yes or no."
    for task, sub in (("existence", True), ("count", True), ("code_reasoning", False)):
        for i in range(2):
            folder = tmp_path / "MME" / task
            text = f"{ask.format('cat')}\tYes\n{ask.format('dog')}\tNo\n"
            path = folder / ("questions_answers_YN" if sub else "") / f"{i}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            make.draw(folder / ("images" if sub else "") / f"{i}.png")
    return tmp_path


def test_mme_scores(mme, make):
    whole = make.canned("mme", mme, lambda s: s.gold.capitalize())[0]
    assert whole["mme_perception"].value == 400 and whole["mme_cognition"].value == 200
    assert whole["mme_existence"].value == whole["mme_existence"].low == 200
    # One of each pair right: accuracy 50, both right 0.
    half = make.canned("mme", mme, lambda s: "Yes")[0]
    assert half["mme_existence"].value == 50 and half["mme_perception"].value == 100
    assert whole["mme_perception"].note == "only 2 of 10 tasks are there"
    # One picture of two all right, of the other none: 50 + 50.
    split = make.canned("mme", mme, lambda s: s.gold if "/0" in s.cluster else "maybe")[0]
    assert split["mme_count"].value == 100


def test_mme_prompts(mme, make):
    official, llava = (make.canned("mme", mme, lambda s: "", style)[1][0].prompt for style in ("official", "llava"))
    assert official == "Is there a cat in this image? Please answer yes or no."
    assert llava == "Is there a cat in this image?\nAnswer the question using a single word or phrase."


def test_mme_control_and_broken_files(mme, make):
    got = make.canned("mme", mme, lambda s: s.gold, control=lambda s: "yes")[0]
    assert (got["mme_existence"].value, got["mme_existence"].control) == (200, 50)
    path = mme / "MME/existence/questions_answers_YN/0.txt"
    path.write_text("one line\tYes\n")
    with pytest.raises(UserError, match="0.txt: 1 questions on one picture, not 2"):
        make.canned("mme", mme, lambda s: "")
    path.write_text("a\tYes\nb\tmaybe\n")
    with pytest.raises(UserError, match="0.txt:2: not QUESTION<tab>Yes or No"):
        make.canned("mme", mme, lambda s: "")
