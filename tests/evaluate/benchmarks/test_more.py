"""AMBER, HallusionBench, RefCOCO, ESC-50 and MMAU from files: prompts and figures of canned answers, by hand."""

import json
import pickle

import pytest

from mmllm.errors import UserError
from mmllm.evaluate.benchmarks import OWN, benchmark_names, get_benchmark


def test_every_benchmark_says_what_it_needs(tmp_path):
    for name in OWN:
        cls = get_benchmark(name)
        assert cls.name == name and cls.layout and cls.source and cls.__doc__ and "official" in cls.styles
        with pytest.raises(UserError, match=r": no .* here; expected: .*; get it from "):
            cls(tmp_path).samples()
    assert set(OWN) <= set(benchmark_names())
    with pytest.raises(UserError, match="did you mean 'hallusion'"):
        get_benchmark("halusion")


@pytest.fixture
def amber(tmp_path, make):
    root = tmp_path / "AMBER"
    truth = [{"id": 1, "type": "generative", "truth": ["dog", "grass"], "hallu": ["cat", "ball"]},
             {"id": 2, "type": "discriminative-hallucination", "truth": "no"},
             {"id": 3, "type": "discriminative-attribute-state", "truth": "yes"},
             {"id": 4, "type": "relation", "truth": "no"}]  # fmt: skip
    queries = [{"id": i, "image": f"AMBER_{min(i, 2)}.jpg", "query": "Describe this image." if i == 1 else f"Q{i}?"}
               for i in range(1, 5)]  # fmt: skip
    make.dump(root / "data/annotations.json", truth)
    make.dump(root / "data/query/query_all.json", queries)
    relation = {"dog": ["puppy"], "grass": ["lawn"], "cat": ["kitten"], "ball": [], "sun": []}
    make.dump(root / "data/relation.json", relation)
    (root / "data/safe_words.txt").write_text("ball\nphoto\n")
    for i in (1, 2):
        make.draw(root / "image" / f"AMBER_{i}.jpg")
    return tmp_path


def test_amber_by_hand(amber, make):
    """Named: puppy (a dog), lawns (grass), kitten (wrong, a cat), sun (wrong), ball (safe): CHAIR 2 / 5."""
    answers = {"1": "A puppy on lawns, a kitten, the sun and a ball.", "2": "No", "3": "No", "4": "no"}
    got, rows, bench = make.canned("amber", amber, lambda s: answers[s.id])
    assert got["amber_chair"].value == 2 / 5 and got["amber_cover"].value == 1 and got["amber_hal"].value == 1
    assert got["amber_cog"].value == 1 / 2 and got["amber_cog"].better == "lower"
    # "no" is the positive answer: one of two found, one wrongly said, "no" in lower case is not an answer.
    assert got["amber_accuracy"].value == pytest.approx(1 / 3) and got["amber_precision"].value == 0.5
    assert got["amber_recall"].value == 0.5 and got["amber_f1"].value == 0.5
    assert got["amber_score"].value == pytest.approx((1 - 0.4 + 0.5) / 2)
    assert got["amber_existence_accuracy"].value == 1 and got["amber_relation_f1"].value == 0
    lmms = make.canned("amber", amber, lambda s: answers[s.id], "lmms")[0]
    assert lmms["amber_accuracy"].value == pytest.approx(2 / 3) and rows[0].prompt == "Describe this image."


def test_amber_with_one_part_only(amber, make):
    queries = amber / "AMBER/data/query/query_all.json"
    rows = [r for r in json.loads(queries.read_text()) if r["id"] > 1]
    queries.unlink()
    make.dump(queries.with_name("query_discriminative.json"), rows)
    got = make.canned("amber", amber, lambda s: "No")[0]
    assert "amber_score" not in got and got["amber_recall"].value == 1


@pytest.fixture
def hallusion(tmp_path, make):
    rows = []
    for category, figures in (("VD", (0, 1)), ("VS", (0, 1))):
        for figure in figures:
            for question in (0, 1):
                shown = 0 if category == "VS" and figure == 0 else 1 + figure
                rows.append({"category": category, "subcategory": "math", "visual_input": str(shown), "set_id": "0",
                             "figure_id": str(figure), "question_id": str(question), "question": "Is it so?",
                             "gt_answer": str((figure + question) % 2), "gt_answer_details": "",
                             "filename": f"./{category}/math/0_{figure}.png" if shown else None})  # fmt: skip
                if shown:
                    make.draw(tmp_path / "hallusion_bench" / category / "math" / f"0_{figure}.png")
    make.dump(tmp_path / "HallusionBench.json", rows)
    return tmp_path


def test_hallusion_groups(hallusion, make):
    right = make.canned("hallusion", hallusion, lambda s: s.gold)[0]
    for name in ("accuracy", "figure_accuracy", "pair_accuracy"):
        assert right[f"hallusion_{name}"].value == 1
    assert right["hallusion_figure_accuracy"].n == 3 and right["hallusion_pair_accuracy"].n == 4
    # Yes always: half of the questions, no figure and no pair whole.
    yes = make.canned("hallusion", hallusion, lambda s: "Yes.")[0]
    assert yes["hallusion_accuracy"].value == 0.5 and yes["hallusion_yes_ratio"].value == 1
    assert yes["hallusion_figure_accuracy"].value == yes["hallusion_pair_accuracy"].value == 0


def test_hallusion_unsure_answers_are_right_only_without_a_figure(hallusion, make):
    got, rows, bench = make.canned("hallusion", hallusion, lambda s: "I cannot tell")
    assert got["hallusion_accuracy"].value == 2 / 8 and all(r.parsed is None for r in rows)
    strict = make.canned("hallusion", hallusion, lambda s: "I cannot tell", "vlmevalkit")[0]
    assert strict["hallusion_accuracy"].value == 0
    bare = next(r.sample for r in rows if not r.sample.media)
    assert [p["type"] for p in bench.prompt(bare)[0]["content"]] == ["text"]
    assert len(bench.control([r.sample for r in rows], 0)) == 6


@pytest.fixture
def refcoco(tmp_path, make):
    root = tmp_path / "refcoco"
    refs = [{"ref_id": i, "ann_id": 50 + i, "image_id": 7, "split": split, "file_name": "x.jpg", "category_id": 1,
             "sentences": [{"sent_id": 10 * i + k, "sent": f"thing {i}"} for k in range(2)]}
            for i, split in enumerate(("val", "testA", "train"))]  # fmt: skip
    root.mkdir()
    with (root / "refs(unc).p").open("wb") as f:
        pickle.dump(refs, f, protocol=0)
    boxes = [[0, 0, 50, 50], [50, 50, 50, 50], [0, 0, 1, 1]]
    make.dump(root / "instances.json", {
        "images": [{"id": 7, "width": 100, "height": 200, "file_name": "COCO_7.jpg"}],
        "annotations": [{"id": 50 + i, "bbox": b} for i, b in enumerate(boxes)]})  # fmt: skip
    make.draw(root / "train2014" / "COCO_7.jpg")
    return tmp_path


def test_refcoco_by_hand(refcoco, make):
    """Truth of val: (0, 0, .5, .25). Half of it overlaps by exactly one half: right, the limit counts."""
    answers = {"0": "[0.0, 0.0, 0.5, 0.125]", "1": "It is [0.5,0.5,1.0,1.0].", "10": "none", "11": "[1, 2, 30, 40]"}
    got, rows, _ = make.canned("refcoco", refcoco, lambda s: answers[s.id])
    assert got["refcoco_val_iou50"].value == 0.5 and got["refcoco_val_mean_iou"].value == pytest.approx(0.25)
    assert got["refcoco_val_centre"].value == 0.5 and got["refcoco_testA_iou50"].value == 0
    assert [r.parsed is None for r in rows] == [False, False, True, True]
    asks = "Please provide the bounding box coordinate of the region this sentence describes: thing 0"
    assert rows[0].prompt == asks + "."
    own = make.canned("refcoco", refcoco, lambda s: "<box>0,0,500,250</box>", "mmllm")
    assert own[0]["refcoco_val_iou50"].value == 1 and own[1][0].prompt == "Where is the thing 0?"
    assert make.canned("refcoco", refcoco, lambda s: "", "lmms")[1][0].prompt.endswith(asks)


def test_refcoco_never_runs_what_a_pickle_holds(refcoco, make, tmp_path):
    class Bad:
        def __reduce__(self):
            return (print, ("ran",))

    with (refcoco / "refcoco" / "refs(unc).p").open("wb") as f:
        pickle.dump([Bad()], f)
    with pytest.raises(UserError, match="not a pickle of plain data .*builtins.print"):
        make.canned("refcoco", refcoco, lambda s: "")


def test_esc50(tmp_path, make):
    names = ["dog", "sea_waves", "dog", "rain"]
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    for i, name in enumerate(names):
        lines.append(f"{i}.wav,{1 + i % 2},{i},{name},False,{i // 2},A")
        make.play(tmp_path / "ESC-50/audio" / f"{i}.wav")
    (tmp_path / "ESC-50/meta").mkdir()
    (tmp_path / "ESC-50/meta/esc50.csv").write_text("\n".join(lines) + "\n")
    answers = {"0.wav": "A dog!", "1.wav": "sea waves", "2.wav": "rain", "3.wav": "rain or a dog"}
    got, rows, _ = make.canned("esc50", tmp_path, lambda s: answers[s.id])
    assert got["esc50_accuracy"].value == 0.5 and got["esc50_accuracy"].chance == pytest.approx(1 / 3)
    assert got["esc50_accuracy_fold1"].value == 0.5 and rows[3].parsed is None
    assert rows[0].prompt == "What is the sound? Choose one of: dog, rain, sea waves."


def test_mmau(tmp_path, make):
    rows = [{"id": f"a{i}", "audio_id": f"./test-mini-audios/a{i}.wav", "question": "Who speaks?", "task": task,
             "choices": choices, "answer": "Woman"}
            for i, (task, choices) in enumerate([("speech", ["Man", "Woman"]), ("sound", '["Man", "Woman"]'),
                                                 ("sound", ["Woman", "Child"])])]  # fmt: skip
    make.dump(tmp_path / "mmau-test-mini.json", rows)
    for i in range(3):
        make.play(tmp_path / "test-mini-audios" / f"a{i}.wav")
    answers = {"a0": "A woman.", "a1": "(B)", "a2": "a woman and a child"}
    got, items, _ = make.canned("mmau", tmp_path, lambda s: answers[s.id])
    assert got["mmau_accuracy"].value == pytest.approx(1 / 3) and got["mmau_accuracy_speech"].value == 1
    assert [r.parsed for r in items] == ["B", None, None] and [r.sample.gold for r in items] == ["B", "B", "A"]
    lmms = make.canned("mmau", tmp_path, lambda s: answers[s.id], "lmms")[1]
    assert [r.parsed for r in lmms] == ["A", "B", None]
    rows[0]["answer"] = "Robot"
    make.dump(tmp_path / "mmau-test-mini.json", rows)
    with pytest.raises(UserError, match="the answer of a0 is none of its choices"):
        make.canned("mmau", tmp_path, lambda s: "")
