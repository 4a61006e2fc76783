"""CIDEr-D against an independent computation and closed forms; caption benchmarks and CHAIR from files."""

import math

import numpy as np
import pytest

from mmllm.evaluate.benchmarks.chair_coco import chair_vocabulary, without_toilet_seats
from mmllm.evaluate.benchmarks.cider import cider_d, tokens

TEXTS = ["a dog runs over the wet grass", "two cats sleep on a red sofa", "a man rides a bike down the street",
         "the dog sleeps on the grass"]  # fmt: skip
REFS = [["a dog is running over grass", "a brown dog runs over the wet grass"],
        ["two cats sleep on the sofa", "cats on a red sofa", "two sleeping cats"],
        ["a man rides a bike", "someone on a bike rides down the street"],
        ["a dog sleeps on the grass", "the dog lies on the grass"]]  # fmt: skip


def grams(text, n):
    words = text.split()
    return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]


def dense_cider_d(captions, references):
    """The definition with dense vectors: clipped cosine of TF-IDF, length penalty in bigrams, mean over n, times 10."""
    out = []
    for caption, refs in zip(captions, references):
        total = 0.0
        for n in (1, 2, 3, 4):
            names = sorted({g for rs in references for r in rs for g in grams(r, n)} | set(grams(caption, n)))
            documents = np.array([sum(any(g in grams(r, n) for r in rs) for rs in references) for g in names])
            idf = math.log(len(references)) - np.log(np.maximum(documents, 1))

            def vector(text, names=names, idf=idf, n=n):
                return np.array([grams(text, n).count(g) for g in names]) * idf

            for r in refs:
                a, b = vector(caption), vector(r)
                norm = np.linalg.norm(a) * np.linalg.norm(b)
                gap = len(grams(caption, 2)) - len(grams(r, 2))
                total += (np.minimum(a, b) @ b / norm if norm else 0) * math.exp(-(gap**2) / 72) / len(refs)
        out.append(10 * total / 4)
    return out


def test_cider_d_equals_the_dense_definition():
    got = cider_d(TEXTS, REFS)
    assert got == pytest.approx(dense_cider_d(TEXTS, REFS), abs=1e-9) and min(got) > 0.5


def test_cider_d_closed_forms():
    whole = [[t] for t in TEXTS]
    assert cider_d(TEXTS, whole) == pytest.approx([10] * 4)
    assert cider_d(TEXTS[:1], whole[:1]) == [0]  # one picture: every weight is log 1
    assert cider_d(["x y z w"] * 4, whole) == [0] * 4
    assert cider_d([""] * 4, REFS) == [0] * 4
    flipped = [list(reversed(r)) for r in REFS]
    assert cider_d(TEXTS, flipped) == pytest.approx(cider_d(TEXTS, REFS))
    # Three bigrams too many, all of words that stand nowhere else: cosine below 1 and the penalty exp(-9 / 72).
    longer = cider_d([TEXTS[0] + " p q r", *TEXTS[1:]], whole)[0]
    assert 0 < longer < 10 * math.exp(-9 / 72)


def test_repeating_a_word_does_not_help():
    plain, repeated = cider_d(["dog grass", *TEXTS[1:]], REFS), cider_d(["dog dog dog grass", *TEXTS[1:]], REFS)
    assert repeated[0] < plain[0]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("A dog's ball.", "a dog 's ball"),
        ("They don't run!", "they do n't run"),
        ("red, white and blue; yes?", "red white and blue yes"),
        ("a black-and-white photo -- nice", "a black-and-white photo nice"),
        ("", ""),
    ],
)
def test_tokens(text, expected):
    assert tokens(text) == expected


def check_captions(make, name, data, n):
    """Own references as captions score high, and far above the control."""
    got, rows, bench = make.canned(name, data, lambda s: s.gold[0], control=lambda s: "something else entirely")
    assert got[f"{name}_cider_d"].n == n and got[f"{name}_cider_d"].unit == "CIDEr-D"
    assert got[f"{name}_cider_d"].value > 5 and got[f"{name}_cider_d"].control == 0
    assert rows[0].hit == pytest.approx(cider_d([tokens(r.answer) for r in rows[:n]],
                                                [[tokens(x) for x in r.sample.gold] for r in rows[:n]])[0])  # fmt: skip
    return rows, bench


def test_flickr30k_and_coco(tmp_path, make):
    images = [{"filename": f"{i}.jpg", "split": "test" if i < 4 else "train", "cocoid": 100 + i, "filepath": "val2014",
               "sentences": [{"raw": r} for r in REFS[i % 4]]} for i in range(5)]  # fmt: skip
    make.dump(tmp_path / "flickr30k/dataset_flickr30k.json", {"images": images})
    make.dump(tmp_path / "COCO/dataset_coco.json", {"images": images})
    for i in range(4):
        make.draw(tmp_path / "flickr30k/flickr30k-images" / f"{i}.jpg")
        make.draw(tmp_path / "COCO/val2014" / f"{i}.jpg")
    rows, _ = check_captions(make, "flickr30k", tmp_path, 4)
    assert rows[0].prompt == "Provide a one-sentence caption for the provided image."
    rows, _ = check_captions(make, "coco_captions", tmp_path, 4)
    assert rows[0].sample.id == "100"


def test_coco_captions_in_their_own_file(tmp_path, make):
    data = {"images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in range(4)],
            "annotations": [{"image_id": i, "caption": r} for i in range(4) for r in REFS[i]]}  # fmt: skip
    make.dump(tmp_path / "annotations/captions_val2017.json", data)
    for i in range(4):
        make.draw(tmp_path / "val2017" / f"{i:012d}.jpg")
    check_captions(make, "coco_captions", tmp_path, 4)


def test_clotho_and_audiocaps(tmp_path, make):
    lines = ["file_name," + ",".join(f"caption_{k}" for k in range(1, 4))]
    lines += [f"{i}.wav," + ",".join((REFS[i] * 2)[:3]) for i in range(4)]
    (tmp_path / "Clotho").mkdir()
    (tmp_path / "Clotho/clotho_captions_evaluation.csv").write_text("\n".join(lines) + "\n")
    for i in range(4):
        make.play(tmp_path / "Clotho/evaluation" / f"{i}.wav")
    rows, bench = check_captions(make, "clotho", tmp_path, 4)
    assert bench.prompt(rows[0].sample)[0]["content"][0]["type"] == "audio"
    lines = ["audiocap_id,youtube_id,start_time,caption"]
    lines += [f"{i}{k},v{i},30,{REFS[i % 4][k]}" for i in range(5) for k in range(2)]
    (tmp_path / "AudioCaps").mkdir()
    (tmp_path / "AudioCaps/test.csv").write_text("\n".join(lines) + "\n")
    for i in range(4):
        make.play(tmp_path / "AudioCaps/audio" / (f"v{i}_30.wav" if i % 2 else f"v{i}.wav"))
    rows, bench = check_captions(make, "audiocaps", tmp_path, 4)
    assert bench.lacking == 1 and len(rows[0].sample.gold) == 2


SYNONYMS = {"person": ["man", "woman", "baby"], "chair": ["seat"], "toilet": [], "dog": ["puppy"], "tie": [],
            "hot dog": [], "elephant": []}  # fmt: skip


@pytest.mark.parametrize(
    "text, mentions",
    [
        ("A man and two puppies.", ["person", "dog"]),
        ("dogs, dogs, dogs", ["dog"] * 3),
        ("eating a hot dog", ["hot dog"]),
        ("a baby elephant", ["elephant"]),
        ("a baby on a seat", ["person", "chair"]),
        ("a man in a bow tie", ["person", "tie"]),
        ("the toilet seat is up", ["toilet"]),
        ("the seat of the toilet", ["toilet"]),
        ("at home plate", []),
        ("", []),
    ],
)
def test_chair_mentions(text, mentions):
    assert chair_vocabulary(SYNONYMS).mentions(without_toilet_seats(text)) == mentions


@pytest.fixture
def chair(tmp_path, make):
    root = tmp_path / "COCO"
    names = ["person", "dog", "chair"]
    make.dump(root / "annotations/instances_val2014.json", {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(2)],
        "categories": [{"id": k, "name": n} for k, n in enumerate(names)],
        "annotations": [{"image_id": 0, "category_id": 0}, {"image_id": 1, "category_id": 1}]})  # fmt: skip
    make.dump(root / "annotations/captions_val2014.json", {"annotations": [
        {"image_id": 0, "caption": "A man on a seat."}, {"image_id": 1, "caption": "A puppy."}]})  # fmt: skip
    (root / "synonyms.txt").write_text("person, man, woman\nchair, seat\ndog, puppy\n")
    for i in range(2):
        make.draw(root / "val2014" / f"{i}.jpg")
    return tmp_path


def test_chair_by_hand(chair, make):
    """Picture 0 holds a person and a chair (from people's captions), picture 1 a dog."""
    answers = {"0": "A woman, a woman and a dog.", "1": "A dog."}
    got, rows, _ = make.canned("chair", chair, lambda s: answers[s.id])
    assert got["chair_s"].value == 0.5 and got["chair_i"].value == 1 / 4 and got["chair_recall"].value == 2 / 3
    assert got["chair_words"].value == 4.5 and rows[0].prompt == "Please describe this image in detail."
    assert got["chair_s"].note == "at most 512 tokens"
    # A person's own caption of the picture has nothing wrong in it; a caption without any name counts as clean.
    clean = make.canned("chair", chair, lambda s: {"0": "A man on a seat.", "1": "Nothing."}[s.id], "short")[0]
    assert clean["chair_s"].value == clean["chair_i"].value == 0 and clean["chair_s"].note == "at most 64 tokens"


def test_chair_of_no_mention_at_all_and_of_listed_pictures(chair, make):
    got = make.canned("chair", chair, lambda s: "")[0]
    assert got["chair_s"].value == 0 and got["chair_i"].value is None and got["chair_recall"].value == 0
    (chair / "COCO/chair_images.txt").write_text("1\n")
    assert [r.sample.id for r in make.canned("chair", chair, lambda s: "")[1]] == ["1"]
