"""`mmllm compare` through the real command, on small predictions files with known differences."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from mmllm.cli.compare import command
from mmllm.cli.main import main
from mmllm.errors import UserError
from mmllm.evaluate.compare import COLUMNS, compare_runs
from mmllm.evaluate.paired import accuracy_difference, auc_difference, holm, mcnemar
from mmllm.evaluate.tasks import Row, Sample

SCENES, QUESTIONS = 40, 4


def answers(skill, seed, task="pope", split="seen", scenes=SCENES):
    """Lines of predictions.jsonl: yes/no questions whose margin holds the truth ``skill`` times, besides noise."""
    rng, lines = np.random.default_rng(seed), []
    for scene in range(scenes):
        for k in range(QUESTIONS):
            gold = "yes" if k % 2 else "no"
            margin = skill * (1 if k % 2 else -1) + float(rng.normal())
            sample = Sample(f"s{scene}:{k}", f"s{scene}", [f"s{scene}.jpg"], f"thing {k}?", gold, ["yes", "no"])
            row = Row(sample, "yes" if margin > 0 else "no", [margin / 2, -margin / 2])
            row.hit = float(row.answer == gold)
            lines.append(row.to_dict(task) | {"split": split})
    return lines


def captions(named, split="seen"):
    samples = [Sample(f"s{i}", f"s{i}", [f"s{i}.jpg"], "What is there?", ["a", "b", "c"]) for i in range(len(named))]
    rows = [Row(s, "a", hit=hit, weight=3.0) for s, hit in zip(samples, named, strict=True)]
    return [r.to_dict("caption") | {"split": split} for r in rows]


def write(folder, lines, **results):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "predictions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    if results:
        (folder / "results.json").write_text(json.dumps(results))
    return folder


def compare(*args):
    """(rows of the printed table by name, lines below it, exit code)."""
    result = CliRunner().invoke(command, [str(a) for a in args], catch_exceptions=False)
    printed = result.output.splitlines()
    assert printed[0] == "\t".join(COLUMNS)
    table = [x.split("\t") for x in printed[1:] if "\t" in x]
    return (
        {r[0].replace(" ", "_"): dict(zip(COLUMNS, r, strict=True)) for r in table},
        printed[1 + len(table) :],
        result.exit_code,
    )


@pytest.fixture
def pair(tmp_path):
    """A run that sees well and one that sees badly, both with captions that name as much; controls beside them."""
    same = captions([i % 4 for i in range(SCENES)])
    settings = {"data": "d", "seed": 0, "limit": None, "sources": [{"name": "x"}]}
    good, bad = answers(1.5, 0), answers(0.1, 1)
    noise = [x | {"control": True, "hit": 1 - x["hit"]} for x in good]
    tuning = [x | {"split": "validation", "hit": 0.0} for x in good]
    a = write(tmp_path / "a" / "eval", good + same + noise + tuning, **settings)
    b = write(tmp_path / "b" / "eval", bad + same, **settings)
    return a, b


def test_lines_equal_the_statistics_of_the_paired_items(pair, tmp_path):
    a, b = answers(1.5, 0), answers(0.1, 1)
    clusters, gold = [x["cluster"] for x in a], [x["gold"] == "yes" for x in a]
    hits = [[x["hit"] for x in side] for side in (a, b)]
    accuracy = accuracy_difference(*hits, clusters)
    ranking = auc_difference(*([x["scores"][0] - x["scores"][1] for x in side] for side in (a, b)), gold, clusters)
    rows, notes, code = compare(pair[0].parent, pair[1].parent, "--out", tmp_path / "deep" / "out.json")
    assert code == 0 and list(rows) == ["pope_seen_accuracy", "pope_seen_auc", "caption_seen_hit_ratio"]
    written = json.loads((tmp_path / "deep" / "out.json").read_text())
    lines = {c["name"]: c for c in written["comparisons"]}
    for name, expected in (("pope_seen_accuracy", accuracy), ("pope_seen_auc", ranking)):
        assert [lines[name][k] for k in ("difference", "low", "high", "p")] == pytest.approx(list(expected), abs=1e-4)
        assert (lines[name]["n"], lines[name]["clusters"], lines[name]["verdict"]) == (160, 40, "a better")
    assert lines["pope_seen_accuracy"]["mcnemar"] == pytest.approx(mcnemar(*hits)[2])
    assert [c["p_adjusted"] for c in lines.values()] == pytest.approx(holm([c["p"] for c in lines.values()]))
    same = rows["caption_seen_hit_ratio"]
    assert same["A"] == same["B"] == "50.0" and same["McNemar p"] == "" and same[""] == "within the noise"
    assert rows["pope_seen_accuracy"][""] == "A better" and rows["pope_seen_accuracy"]["McNemar p"] == "<0.001"
    assert len(notes) == 2 and "Holm over 3 lines" in notes[0] and notes[1].startswith("figures: ")


def test_figures_file_has_the_common_form(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["mmllm", "compare", "a run", "b", "--seed", "3"])
    compare(*pair, "--out", tmp_path / "out.json", "--seed", "3")
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["seed"] == 3 and written["sources"] == [{"name": "x"}]
    assert written["command"] == "mmllm compare 'a run' b --seed 3"
    figure = written["figures"][0]
    assert figure["name"] == "pope_seen_accuracy_difference" and figure["low"] <= figure["value"] <= figure["high"]
    assert figure["value"] == pytest.approx(figure["arms"]["a"] - figure["arms"]["b"])
    assert figure["verdict"] == "A better" and "40 clusters" in figure["note"] and figure["n"] == 160


def test_run_folder_evaluation_folder_and_file_are_the_same(pair):
    folders = compare(*pair)[0]
    assert folders == compare(*(p.parent for p in pair))[0] == compare(*(p / "predictions.jsonl" for p in pair))[0]
    turned = compare(pair[1], pair[0])[0]
    assert turned["pope_seen_accuracy"][""] == "B better" and turned["pope_seen_auc"]["A - B"].startswith("-")
    assert {r[""] for r in compare(pair[0], pair[0])[0].values()} == {"within the noise"}


def test_missing_and_differently_asked_items_are_counted_and_named(tmp_path):
    a, b = answers(1.0, 0), answers(1.0, 1)
    extra = answers(1.0, 2, task="interleaved", scenes=1)
    b[10]["question"], b[11]["gold"] = "another?", "maybe"
    write(tmp_path / "a", a[:-2] + extra)
    write(tmp_path / "b", b[6:])
    rows, notes, _ = compare(tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out.json")
    assert rows["pope_seen_accuracy"]["n (clusters)"] == "150 (39)"
    assert "pope seen: 6 items only in A: s0:0, s0:1, s0:2, ..." in notes
    assert "interleaved seen: 4 items only in A: s0:0, s0:1, s0:2, ..." in notes
    assert "pope seen: 2 items only in B: s39:2, s39:3" in notes
    assert "pope seen: 2 items asked differently: s2:2, s2:3" in notes
    left_out = json.loads((tmp_path / "out.json").read_text())["left_out"]
    assert left_out["only in A"]["pope seen"] == [f"s{i // 4}:{i % 4}" for i in range(6)]


def test_different_settings_are_told_in_one_line(pair, tmp_path):
    b = write(tmp_path / "other", answers(0.1, 1), data="d", seed=1, limit=20)
    notes = compare(pair[0], b)[1]
    assert "the runs were evaluated differently (A and B): seed 0 and 1; limit none and 20" in notes
    alone = write(tmp_path / "alone", answers(0.1, 1))
    told = compare(pair[0], alone)[1]
    assert "no results.json beside the predictions of B: data, seed and limit not compared" in told


def test_lines_of_older_files_take_the_media_as_cluster(pair, tmp_path):
    old = []
    for folder in pair:
        lines = [json.loads(x) for x in (folder / "predictions.jsonl").read_text().splitlines()]
        bare = [{k: v for k, v in x.items() if k != "cluster"} for x in lines]
        old.append(write(tmp_path / folder.parent.name / "old", bare))
    assert compare(*old)[0] == compare(*pair)[0]


def test_kinds_of_questions_stand_apart_and_must_agree(tmp_path):
    def with_kinds(lines, skipped):
        kinds = [["random"], ["random", "popular"], ["popular"], ["popular", "random"]]
        kinds[2] = skipped
        return [x | {"meta": {"kinds": kinds[i % 4]}} for i, x in enumerate(lines)]

    write(tmp_path / "a", with_kinds(answers(1, 0), ["popular"]))
    write(tmp_path / "b", with_kinds(answers(1, 1), ["adversarial"]))
    rows, notes, _ = compare(tmp_path / "a", tmp_path / "b")
    assert {k: r["n (clusters)"] for k, r in rows.items()} == {
        "pope_seen_random_accuracy": "120 (40)",
        "pope_seen_random_auc": "120 (40)",
        "pope_seen_popular_accuracy": "80 (40)",
    }
    assert any(n.startswith("pope seen: 40 items asked differently: s0:2, ") for n in notes)


def test_no_auc_without_scores_of_yes_and_no(tmp_path):
    bare = [{k: v for k, v in x.items() if k not in ("choices", "scores")} for x in answers(1, 0)]
    write(tmp_path / "a", answers(1, 0))
    write(tmp_path / "b", bare)
    assert list(compare(tmp_path / "a", tmp_path / "b")[0]) == ["pope_seen_accuracy"]
    turned = [x | {"choices": ["no", "yes"], "scores": x["scores"][::-1]} for x in answers(1, 0)]
    write(tmp_path / "c", turned)
    assert compare(tmp_path / "a", tmp_path / "c")[0]["pope_seen_auc"]["A - B"] == "0.0"


BROKEN = [
    ({"task": "pope"}, r"predictions\.jsonl:1: not a line of mmllm eval, it has no 'split'"),
    (answers(1, 0)[0] | {"hit": "right"}, r":1: 'hit' is no number: 'right'"),
    (answers(1, 0)[0] | {"scores": [0.5]}, r":1: 'scores' is no list of 2 numbers"),
    (answers(1, 0)[0] | {"scores": [0.5, None]}, r":1: 'scores' is no number: None"),
    ({"task": "pope", "split": "seen", "id": "x", "hit": 1.0}, r":1: the line has neither 'cluster' nor 'media'"),
]


@pytest.mark.parametrize("line, message", BROKEN)
def test_broken_lines_are_one_clear_line(pair, tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        compare_runs(pair[0], write(tmp_path / "bad", [line]))


def test_wrong_folders_are_one_clear_line(pair, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no eval/predictions\.jsonl in this folder; run mmllm eval"):
        compare_runs(pair[0], tmp_path / "empty")
    with pytest.raises(UserError, match="absent: no such run"):
        compare_runs(tmp_path / "absent", pair[0])
    with pytest.raises(UserError, match="no item in common"):
        compare_runs(pair[0], write(tmp_path / "far", answers(1, 0, split="new_vendor")))
    with pytest.raises(UserError, match=r":2: item pope seen s0:0 stands here a second time"):
        compare_runs(pair[0], write(tmp_path / "twice", answers(1, 0)[:1] * 2))
    write(tmp_path / "torn", answers(1, 0))
    (tmp_path / "torn" / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"results\.json: not a results file"):
        compare_runs(pair[0], tmp_path / "torn")
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(tmp_path / "absent"), str(pair[0])])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
