"""Every benchmark made here is read back by its own class: true answers score best, fixed ones as known."""

import csv
import json
import pickle

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mmllm.errors import UserError
from mmllm.evaluate.made.coco import captions, distinct
from mmllm.evaluate.made.make import items_of, make_benchmarks
from mmllm.evaluate.made.material import Material
from mmllm.evaluate.made.pairs import make_pair


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def scenes(root):
    return [json.loads(x) for x in (root / "eval" / "scenes_seen.jsonl").read_text().splitlines()]


def test_same_seed_same_bytes_other_seed_other_questions(made, made_from, tmp_path):
    again = make_benchmarks(str(made_from), tmp_path / "again")
    assert tree(again) == tree(made)
    other = make_benchmarks(str(made_from), tmp_path / "other", seed=1)
    changed = {"POPE/coco_pope_random.json", "MMVP/Questions.csv", "SEED-Bench/SEED-Bench.json"}
    a, b = tree(made), tree(other)
    assert all(a[x] != b[x] for x in changed)
    assert a["coco/annotations/instances_val2014.json"] == b["coco/annotations/instances_val2014.json"]


@pytest.mark.parametrize("name, kind", [("POPE", "random"), ("POPE", "popular"), ("POPE_training", "adversarial")])
def test_pope(made, made_from, ask, name, kind):
    there = {f"COCO_val2014_{i:012d}.jpg": {b["text"] for b in s["boxes"]}
             for i, s in enumerate(scenes(made_from), 1)}  # fmt: skip
    rows = [json.loads(x) for x in (made / name / f"coco_pope_{kind}.json").read_text().splitlines()]
    assert set(rows[0]) == {"question_id", "image", "text", "label"}
    for row in rows:
        named = [x for x in there[row["image"]] if f" {x} " in row["text"]]
        assert bool(named) == (row["label"] == "yes")
    right = ask("pope", made / name, lambda s: s.gold).figures
    always = ask("pope", made / name, lambda s: "yes").figures
    assert (right[f"pope_{kind}_accuracy"], right[f"pope_{kind}_f1"]) == (1, 1)
    assert always[f"pope_{kind}_accuracy"] == 0.5 and always[f"pope_{kind}_recall"] == 1
    assert always[f"pope_{kind}_f1"] == pytest.approx(2 / 3) and always[f"pope_{kind}_yes_ratio"] == 1


def test_mme(made, ask):
    right = ask("mme", made, lambda s: s.gold.capitalize()).figures
    always = ask("mme", made, lambda s: "Yes").figures
    for task in ("existence", "count", "position"):
        assert right[f"mme_{task}"] == 200 and always[f"mme_{task}"] == 50
    assert right["mme_perception"] == 600
    orders = {tuple(s.gold for s in pair) for pair in _pairs(ask("mme", made, lambda s: "Yes").rows)}
    assert orders == {("yes", "no"), ("no", "yes")}


def _pairs(rows):
    samples = [r.sample for r in rows]
    return zip(samples[::2], samples[1::2])


def test_mme_is_true(made, made_from, ask):
    numbers = ("zero", "one", "two", "three", "four")
    for row in ask("mme", made, lambda s: "Yes").rows:
        s = row.sample
        boxes = scenes(made_from)[int(s.meta["picture"].rsplit("_", 1)[-1]) - 1]["boxes"]
        if s.meta["split"] == "count":
            true = f" {numbers[len(boxes)]} thing" in s.question
        elif s.meta["split"] == "existence":
            true = any(f" {b['text']} " in s.question for b in boxes)
        else:
            box = next(b["xyxy"] for b in boxes if f" {b['text']} " in s.question)
            true = ("left" if box[0] + box[2] < 1 else "right") in s.question
        assert s.gold == ("yes" if true else "no"), s.question


def test_amber(made, ask):
    def told(s):
        return f"I see {', '.join(s.gold)}" if s.meta["split"] == "generative" else s.gold.capitalize()

    right = ask("amber", made, told)
    assert right.figures["amber_score"] == pytest.approx(1) and right.figures["amber_cover"] == 1
    assert (right.figures["amber_chair"], right.figures["amber_hal"], right.figures["amber_cog"]) == (0, 0, 0)
    assert {r.sample.meta.get("kind") for r in right.rows} == {None, "existence", "attribute", "relation"}
    always = ask("amber", made, lambda s: "Yes").figures
    assert always["amber_accuracy"] == 0.5 and always["amber_f1"] == 0
    # What training shows beside the present things counts as wrong and as a likely mistake.
    wrong = ask("amber", made, lambda s: " ".join(s.meta.get("hallu", [])) or "No")
    assert wrong.figures["amber_chair"] == 1 and wrong.figures["amber_cog"] == 1
    for row in wrong.rows:
        assert not set(row.sample.meta.get("hallu", [])) & set(row.sample.gold)


def test_chair_and_captions(made, made_from, ask):
    right = ask("chair", made, lambda s: f"There is {' and '.join(s.gold)}.").figures
    assert right["chair_s"] == 0
    assert right["chair_i"] == 0 and right["chair_recall"] == 1
    absent = ask("chair", made, lambda s: next(x for x in ("cat", "owl", "boat", "tree") if x not in s.gold)).figures
    assert absent["chair_s"] == 1 and absent["chair_i"] == 1 and absent["chair_recall"] == 0
    kept = distinct(Material(made_from).scenes)
    assert len(kept) == len({captions(s)[0] for s in kept}) < len(scenes(made_from))
    rows = ask("coco_captions", made, lambda s: s.gold[0])
    assert [r.sample.gold for r in rows.rows] == [captions(s) for s in kept]
    other = ask("coco_captions", made, lambda s: "nothing of the kind")
    assert rows.figures["coco_captions_cider_d"] > 1 and other.figures["coco_captions_cider_d"] < 0.1
    # No word of the five wordings is itself the name of a thing.
    bench = ask("chair", made, lambda s: "").bench
    for s in kept:
        assert all(sorted(set(bench._mentions(text))) == sorted(s.labels) for text in captions(s))


def test_refcoco(made, made_from, ask):
    def box(s):
        return str([round(v, 5) for v in s.gold])

    right = ask("refcoco", made, box)
    assert right.figures["refcoco_val_iou50"] == 1 and right.figures["refcoco_val_mean_iou"] > 0.999
    assert ask("refcoco", made, lambda s: "[0, 0, 0.01, 0.01]").figures["refcoco_val_iou50"] == 0
    assert ask("refcoco", made, lambda s: "<box>0,0,999,999</box>", "mmllm").rows[0].parsed == (0, 0, 1, 1)
    truth = scenes(made_from)
    for row in right.rows:
        boxes = truth[int(row.sample.cluster) - 1]["boxes"]
        mine = [b for b in boxes if np.allclose(b["xyxy"], row.sample.gold, atol=1e-3)]
        assert len(mine) == 1
        if row.sample.question.startswith("thing"):
            ends = sorted(boxes, key=lambda b: b["xyxy"][0])
            assert mine[0] is (ends[0] if "left" in row.sample.question else ends[-1])
        else:
            assert row.sample.question == mine[0]["text"]
    refs = pickle.loads((made / "refcoco" / "refs(unc).p").read_bytes())
    assert {"ref_id", "ann_id", "image_id", "split", "category_id", "sent_ids", "sentences"} <= set(refs[0])


@pytest.mark.parametrize("name, top", [("seed", "seed_accuracy"), ("mmbench", "mmbench_circular")])
def test_options(made, ask, tmp_path, name, top):
    right = ask(name, made, lambda s: s.gold, scratch=tmp_path)
    assert right.figures[top] == 1
    first = ask(name, made, lambda s: "A", scratch=tmp_path)
    share = sum(r.sample.gold == "A" for r in first.rows) / len(first.rows)
    assert first.figures[top] == (0 if name == "mmbench" else pytest.approx(share)) and 0.05 < share < 0.5
    for row in right.rows:
        options = list(row.sample.meta["options"].values())
        assert len(options) == 4 == len(set(options))


def test_seed_is_true(made, made_from, ask):
    from mmllm.data.questions import NUMBERS, with_article

    kinds = set()
    for row in ask("seed", made, lambda s: "A").rows:
        s, kind = row.sample, row.sample.meta["kind"]
        kinds.add(kind)
        boxes = scenes(made_from)[int(s.cluster[-16:-4]) - 1]["boxes"]
        said = s.meta["options"][s.gold]
        labels = [with_article(b["text"]) for b in boxes]
        if kind == "Instance Identity":
            assert [x for x in s.meta["options"].values() if x in labels] == [said]
        elif kind == "Instances Counting":
            assert said == NUMBERS[len(boxes)]
        elif kind == "Spatial Relation":
            assert said == with_article(min(boxes, key=lambda b: b["xyxy"][0])["text"])
        else:
            box = next(b["xyxy"] for b in boxes if f" {b['text']}?" in s.question)
            middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            assert said == f"{'top' if middle[1] < 0.5 else 'bottom'} {'left' if middle[0] < 0.5 else 'right'}"
    assert kinds == {"Instance Identity", "Instances Counting", "Spatial Relation", "Instance Location"}


def test_mmvp_pairs_differ_in_one_thing(made, made_from, ask):
    right = ask("mmvp", made, lambda s: f"({s.gold.lower()})")
    assert right.figures["mmvp_pair_accuracy"] == 1 and len(right.rows) == 150
    first = ask("mmvp", made, lambda s: "(a)").figures
    assert first["mmvp_accuracy"] == 0.5 and first["mmvp_pair_accuracy"] == 0
    material = Material(made_from)
    for index in range(8):
        pair = make_pair(material, index)
        changed = (pair.images[0] != pair.images[1]).any(-1)
        assert changed.any() and not changed[~pair.differs].any() and sorted(pair.right) == [0, 1]
        # The files say the same: blocks of eight pixels that lie outside the changed thing are equal.
        read = [np.asarray(Image.open(made / "MMVP" / "MMVP Images" / f"{2 * index + k}.jpg")) for k in (1, 2)]
        blocks = pair.differs.reshape(24, 8, 24, 8).any((1, 3))
        assert not (read[0] != read[1]).any(-1).reshape(24, 8, 24, 8).any((1, 3))[~blocks].any()
    with (made / "MMVP" / "Questions.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == ["Index", "Question", "Options", "Correct Answer"]
    assert all(a["Question"] == b["Question"] and a["Options"] == b["Options"] for a, b in zip(rows[::2], rows[1::2]))


def test_sounds(made, ask):
    right = ask("esc50", made, lambda s: s.gold)
    assert right.figures["esc50_accuracy"] == 1 and len(right.rows) == 8 and len(right.rows[0].sample.choices) == 4
    assert ask("esc50", made, lambda s: "cat").figures["esc50_accuracy"] == 0.25
    told = ask("clotho", made, lambda s: s.gold[2])
    assert len(told.rows) == 4 and all(len(r.sample.gold) == 5 for r in told.rows)
    assert told.figures["clotho_cider_d"] > ask("clotho", made, lambda s: "rain").figures["clotho_cider_d"]


def test_the_command(made_from, tmp_path):
    from mmllm.cli.data import command

    out = tmp_path / "bench"
    args = ["bench", "--dataset", str(made_from), "--out", str(out), "--tasks", "pope,mmvp", "--limit", "4"]
    result = CliRunner().invoke(command, args, catch_exceptions=False)
    assert result.exit_code == 0 and "mmvp 8" in result.output and "--tasks pope,mmvp" in result.output
    assert items_of(out)["mmvp"] == 8
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    CliRunner().invoke(command, args, catch_exceptions=False)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_bad_input(made_from, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("keep me")
    with pytest.raises(UserError, match="holds no benchmarks made here"):
        make_benchmarks(str(made_from), full)
    assert (full / "thesis.txt").read_text() == "keep me"
    with pytest.raises(UserError, match="unknown benchmark"):
        make_benchmarks(str(made_from), tmp_path / "x", ["popes"])
    with pytest.raises(UserError, match="unknown split"):
        make_benchmarks(str(made_from), tmp_path / "x", split="held")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="concepts.json"):
        make_benchmarks(str(tmp_path / "empty"), tmp_path / "x")
    assert not (tmp_path / "x").exists()
