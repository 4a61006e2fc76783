"""TextVQA, VQAv2 and GQA from files; the VQA score and its two normalisations by hand."""

import pytest

from mmllm.errors import UserError
from mmllm.evaluate.benchmarks import vqa_score


@pytest.mark.parametrize("matches, score", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_soft_score_leaves_one_person_out(matches, score):
    people = ["yes"] * matches + [f"other{i}" for i in range(10 - matches)]
    assert vqa_score.soft_score("yes", people) == pytest.approx(score)


@pytest.mark.parametrize(
    "text, official, evalai",
    [
        ("The Dog.", "dog", "dog"),
        ("two cats", "2 cats", "2 cats"),
        ("none", "0", "0"),
        ("1,000", "1000", "1000"),
        ("3.5", "3.5", "3.5"),
        ("red, white", "red white", "red white"),
        ("red/white", "red white", "red white"),
        ("red / white", "red white", "red white"),
        ("dont know", "don't know", "don't know"),
        ("couldnt've", "couldn't've", "couldn't've"),
        ("McDonald's", "mcdonald's", "mcdonald 's"),
        ("what?", "what", "what"),
        ("a.m.", "am", "am"),
        ("A\nB", "b", "b"),
        ("", "", ""),
    ],
)
def test_normalisation(text, official, evalai):
    assert (vqa_score.official_answer(text, ["x", "y"]), vqa_score.evalai_answer(text)) == (official, evalai)


def test_contractions_are_words_without_their_apostrophe():
    table = vqa_score.CONTRACTIONS
    assert table["isnt"] == "isn't" and table["yall'd've"] == "y'all'd've" and table["'ows'at"] == "'ow's'at"
    assert table["somebody'd"] == "somebodyd" and "its" not in table and "well" not in table
    assert all(w.replace("'", "") == k.replace("'", "") for k, w in table.items())


def test_where_all_people_agree_the_official_score_normalises_nothing():
    assert vqa_score.official_score("No.", ["no"] * 10) == 0 and vqa_score.evalai_score("No.", ["no"] * 10) == 1
    assert vqa_score.official_score("No.", ["no"] * 9 + ["yes"]) == 1 == vqa_score.official_score("no\n", ["no"] * 10)


@pytest.fixture
def textvqa(tmp_path, make):
    same = {"question": "what Brand is it?", "answers": ["nokia"] * 4 + ["x"] * 6}
    rows = [{"question_id": i, "image_id": f"p{i}", **same} for i in range(2)]
    make.dump(tmp_path / "TextVQA" / "TextVQA_0.5.1_val.json", {"data": rows})
    for i in range(2):
        make.draw(tmp_path / "TextVQA" / "train_images" / f"p{i}.jpg")
    return tmp_path


def test_textvqa(textvqa, make):
    got, rows, _ = make.canned("textvqa", textvqa, lambda s: "Nokia." if s.id == "0" else "samsung")
    assert got["textvqa_accuracy"].value == 0.5
    assert rows[0].prompt == "what Brand is it?\nAnswer the question using a single word or phrase."
    lmms = make.canned("textvqa", textvqa, lambda s: "", "lmms")[1][0].prompt
    assert lmms.startswith("What brand is it?\nAnswer")
    with pytest.raises(UserError, match="no TextVQA_Rosetta_OCR"):
        make.canned("textvqa", textvqa, lambda s: "", "llava")
    ocr = [{"image_id": f"p{i}", "ocr_tokens": ["NOKIA", "3310"]} for i in range(2)]
    make.dump(textvqa / "TextVQA" / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": ocr})
    llava = make.canned("textvqa", textvqa, lambda s: "", "llava")[1][0].prompt
    assert llava.startswith("what Brand is it?\nReference OCR token: NOKIA, 3310\nAnswer")


def test_vqav2(tmp_path, make):
    root = tmp_path / "VQAv2"
    asked = [{"question_id": 10 + i, "image_id": 7, "question": "How many?"} for i in range(2)]
    kinds = ("number", "other")
    answered = [{"question_id": 10 + i, "answer_type": kinds[i], "answers": [{"answer": "2", "answer_id": k}
                 for k in range(10)]} for i in range(2)]  # fmt: skip
    make.dump(root / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
    make.dump(root / "v2_mscoco_val2014_annotations.json", {"annotations": answered})
    make.draw(root / "val2014" / "COCO_val2014_000000000007.jpg")
    got, rows, _ = make.canned("vqav2", tmp_path, lambda s: "2" if s.id == "10" else "Two")
    assert (got["vqav2_accuracy"].value, got["vqav2_accuracy_number"].value, got["vqav2_accuracy_other"].value) \
        == (0.5, 1, 0)  # fmt: skip
    assert rows[0].parsed == "2" and rows[0].sample.cluster == "7"
    (root / "v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(UserError, match="no v2_mscoco_val2014_annotations.json here; .*visualqa.org"):
        make.canned("vqav2", tmp_path, lambda s: "")


def test_gqa(tmp_path, make):
    one = {"question": "Colour?", "answer": "light blue", "imageId": "n1", "types": {"structural": "query"}}
    questions = {str(i): one for i in range(4)}
    make.dump(tmp_path / "testdev_balanced_questions.json", questions)
    make.draw(tmp_path / "images" / "n1.jpg")
    answers = {"0": "Light blue.", "1": "light-blue", "2": "blue", "3": "light blue"}
    official = make.canned("gqa", tmp_path, lambda s: answers[s.id])[0]
    lmms = make.canned("gqa", tmp_path, lambda s: answers[s.id].replace("-", ", "), "lmms")[0]
    assert official["gqa_accuracy"].value == official["gqa_accuracy_query"].value == 0.5
    assert lmms["gqa_accuracy"].value == 0.75
