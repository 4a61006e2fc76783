"""The whole of `mmllm eval` on a small dataset: a decoder that sees, one that is blind, one that leans to no."""

import json
import zlib

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from tiny_mm import tiny_model

from mmllm.data.questions import caption, format_box, with_article
from mmllm.decode import Decoder
from mmllm.decode.requests import Result
from mmllm.errors import UserError
from mmllm.evaluate.answer import Asked, answer_in_processes, load_decoder, media_portions, shares
from mmllm.evaluate.gallery import gallery_items
from mmllm.evaluate.run import run_eval, run_evals
from mmllm.report.figures import read_figures

NAMES = ["cat", "dog", "owl", "bell", "lamp", "kite", "boat", "tree"]
LLM_TASKS = ["pope", "caption", "side", "box", "interleaved", "hear"]


def scene(folder, index, prefix):
    rng = np.random.default_rng((zlib.crc32(prefix.encode()), index))
    boxes = []
    for place, name in enumerate(rng.choice(NAMES, 3, replace=False)):
        x, y = 0.02 + 0.33 * place, float(rng.uniform(0, 0.7))
        boxes.append({"xyxy": [x, y, x + 0.28, y + 0.25], "text": str(name)})
    file = f"{prefix}{index}.png"
    Image.new("RGB", (16, 16), tuple(int(c) for c in rng.integers(0, 255, 3))).save(folder / "scenes" / file)
    return {"id": f"{prefix}{index}", "image": f"../scenes/{file}", "boxes": boxes}


def lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for folder in ("scenes", "eval", "align"):
        (root / folder).mkdir()
    (root / "dataset.json").write_text(json.dumps({"sources": [{"name": "x"}], "missing": []}))
    for split in ("seen", "new_vendor"):
        lines(root / f"eval/scenes_{split}.jsonl", [scene(root, i, split) for i in range(40)])
    lines(root / "align/regions_val.jsonl", [scene(root, i, "val") for i in range(20)])
    sounds = []
    for i in range(16):
        (root / "scenes" / f"{i}.wav").write_bytes(b"")
        options = [NAMES[(i + k) % 8] for k in (0, 2, 3, 5)]
        sounds.append({"id": f"h{i}", "audio": f"../scenes/{i}.wav", "question": "Do you hear ...?", "options": options,
                       "answer": NAMES[i % 8]})  # fmt: skip
    lines(root / "eval/hear.jsonl", sounds)
    mixed = []
    seen = [scene(root, i, "seen") for i in range(40)]
    for i in range(20):
        three = seen[i : i + 3]
        names = {b["text"] for b in three[1]["boxes"]}
        thing = sorted(names)[0] if i % 2 else sorted(set(NAMES) - names)[0]
        answer = "yes" if i % 2 else "no"
        branch = [{"role": r, "content": [{"type": "text", "text": t}]}
                  for r, t in (("user", f"{thing} in picture 2?"), ("assistant", answer))]  # fmt: skip
        parts = [{"type": "image", "path": s["image"]} for s in three]
        mixed.append({"id": f"m{i}", "messages": [{"role": "user", "content": parts}], "branches": [branch]})
    lines(root / "eval/interleaved_seen.jsonl", mixed)
    return root


class Seeing:
    """Answers from the contents of the files it is shown, as a perfect model would; ``lean`` is added to no."""

    def __init__(self, root, lean=0.0):
        self.lean, self.contents = lean, {}
        for name in ("eval/scenes_seen", "eval/scenes_new_vendor", "align/regions_val"):
            for row in map(json.loads, (root / f"{name}.jsonl").read_text().splitlines()):
                self.contents[row["image"].split("/")[-1]] = row["boxes"]

    def look(self, request):
        parts = request.messages[0]["content"]
        media = [str(p["path"]).split("/")[-1] for p in parts if p["type"] != "text"]
        return [self.contents.get(m, m) for m in media] or [[]], parts[-1]["text"]

    def evidence(self, request, candidate):
        shown, question = self.look(request)
        if question.startswith("Do you hear"):
            return float(candidate == with_article(NAMES[int(shown[0].split(".")[0]) % 8]))
        boxes = shown[1] if "picture 2" in question else shown[0]
        if candidate in ("left", "right"):
            box = next((b for b in boxes if f" {b['text']} " in question), None)
            return 0.0 if box is None else float((box["xyxy"][0] + box["xyxy"][2] < 1) == (candidate == "left"))
        there = any(b["text"] in question for b in boxes)
        return 3.0 * (there == (candidate == "yes")) + self.lean * (candidate == "no")

    def score(self, requests, candidates):
        return [[self.evidence(r, c) for c in cs] for r, cs in zip(requests, candidates, strict=True)]

    def generate(self, requests):
        out = []
        for request in requests:
            (boxes, *_), question = self.look(request)
            thing = next((b for b in boxes if f" {b['text']}?" in question), None)
            place = format_box(thing["xyxy"]) if thing else "nowhere"
            out.append(Result(place if question.startswith("Where") else caption(boxes).answer))
        return out


class NoPicture(Seeing):
    """Sees what there is; the interleaved question is about the first picture where there is no second."""

    def evidence(self, request, candidate):
        if len(request.messages[0]["content"]) == 1:
            return float(candidate == "no")
        return super().evidence(request, candidate)


class Blind(Seeing):
    """Answers by the words of the question alone."""

    def evidence(self, request, candidate):
        return zlib.crc32((request.messages[0]["content"][-1]["text"] + candidate).encode()) / 2**32

    def generate(self, requests):
        return [Result("a cat, a dog.") for _ in requests]


def figures_of(dataset, out, decoder, **kwargs):
    tasks = kwargs.pop("tasks", LLM_TASKS)
    return {f.name: f for f in run_eval("model", dataset, tasks, out=out, decoder=decoder, **kwargs)}


def test_a_seeing_model_is_perfect_and_its_control_is_not(dataset, tmp_path):
    got = figures_of(dataset, tmp_path, Seeing(dataset))
    perfect = ["pope_accuracy_seen", "pope_accuracy_new_vendor", "pope_accuracy_seen_popular", "pope_f1_seen",
               "pope_accuracy_seen_adversarial", "pope_auc_seen", "pope_auc_new_vendor", "caption_recall_seen",
               "caption_recall_new_vendor", "side_accuracy_seen", "box_accuracy_iou50", "interleaved_accuracy",
               "hear_accuracy", "pope_accuracy_seen_calibrated"]  # fmt: skip
    for name in perfect:
        f = got[name]
        assert (f.value, f.low, f.high) == (1, 1, 1), name
        assert f.chance is not None and f.n, name
        assert f.control is not None and f.control < 0.85, (name, f.control)
    assert (
        got["chair_i_seen"].value == 0 and got["chair_i_seen"].control > 0.3 and got["chair_s_seen"].better == "lower"
    )
    assert got["pope_accuracy_seen"].n == 240 and got["pope_yes_ratio_seen"].value == 0.5
    assert got["hear_accuracy"].chance == 0.25 and got["pope_accuracy_seen_over_shuffled"].low > 0.2
    assert {f.name for f in read_figures(tmp_path / "results.json")} == set(got)


def test_without_media_a_seeing_model_is_blind_and_margins_are_judged(dataset, tmp_path):
    """No picture: it says no to everything, so it is right where that is true."""
    (tmp_path / "model").mkdir()
    stated = {"pope_accuracy_seen": 0.5, "box_accuracy_iou50": 0.99, "caption_recall_seen": 1.01}
    (tmp_path / "model" / "config.yaml").write_text(json.dumps({"margins": stated}))
    tasks = ["pope", "caption", "box", "interleaved", "side"]
    figures = run_eval(tmp_path / "model", dataset, tasks, decoder=NoPicture(dataset), blind=True)
    got = {f.name: f for f in figures}
    blind = got["pope_accuracy_seen"].controls["blind"]
    assert blind["value"] == 0.5 and got["pope_accuracy_seen"].control not in (None, 0.5)
    over = got["pope_accuracy_seen_over_blind"]
    assert over.value == 0.5 and over.n == 240 and (over.target, over.verdict) == (0.5, "met")
    assert got["box_accuracy_iou50"].controls["blind"]["value"] == 0
    assert got["box_accuracy_iou50_over_blind"].verdict == "met"
    assert got["caption_recall_seen_over_blind"].verdict == "missed"
    assert got["side_accuracy_seen_over_blind"].target is None and "pope_accuracy_seen_over_shuffled" in got
    rows = [json.loads(x) for x in (tmp_path / "model" / "eval" / "predictions.jsonl").read_text().splitlines()]
    assert sum(not r["media"] for r in rows) == sum(r["control"] and bool(r["media"]) for r in rows) > 0
    plain = {f.name: f for f in run_eval("m", dataset, tasks, out=tmp_path / "o", decoder=Seeing(dataset))}
    assert plain["pope_accuracy_seen"].value == got["pope_accuracy_seen"].value
    assert plain["pope_accuracy_seen"].control == got["pope_accuracy_seen"].control


def test_a_blind_model_does_not_beat_its_control(dataset, tmp_path):
    got = figures_of(dataset, tmp_path, Blind(dataset))
    for name in ("pope_accuracy_seen", "side_accuracy_seen", "caption_recall_new_vendor"):
        assert got[f"{name}_over_shuffled"].value == 0
    assert got["pope_auc_seen"].low < 0.5 < got["pope_auc_seen"].high
    assert got["pope_accuracy_seen"].control == pytest.approx(got["pope_accuracy_seen"].value)
    assert got["box_accuracy_iou50"].value == 0


def test_a_leaning_model_is_mended_by_a_threshold_from_other_scenes_only(dataset, tmp_path):
    got = figures_of(dataset, tmp_path, Seeing(dataset, lean=10), tasks=["pope"])
    assert got["pope_accuracy_seen"].value == 0.5 and got["pope_yes_ratio_seen"].value == 0
    assert got["pope_f1_seen"].value == 0 and got["pope_auc_seen"].value == 1
    assert got["pope_accuracy_seen_calibrated"].value == got["pope_accuracy_new_vendor_calibrated"].value == 1
    rows = [json.loads(x) for x in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    judged = {m for r in rows if r["split"] != "validation" for m in r["media"]}
    assert not judged & {m for r in rows if r["split"] == "validation" for m in r["media"]}


def test_validation_scenes_among_the_judged_ones_are_refused(dataset, tmp_path):
    import shutil

    bad = tmp_path / "bad"
    shutil.copytree(dataset, bad)
    shutil.copy(bad / "eval/scenes_seen.jsonl", bad / "align/regions_val.jsonl")
    with pytest.raises(UserError, match="also judged"):
        run_eval("model", bad, ["pope"], out=tmp_path, decoder=Seeing(dataset))


def test_limit_no_control_and_repeatability(dataset, tmp_path):
    a = figures_of(dataset, tmp_path / "a", Seeing(dataset), limit=5, shuffled=False, seed=1)
    b = figures_of(dataset, tmp_path / "b", Seeing(dataset), limit=5, shuffled=False, seed=1)
    assert a == b and a["pope_accuracy_seen"].n == 30 and a["caption_recall_seen"].n == 5
    assert a["pope_accuracy_seen"].control is None and "pope_accuracy_seen_over_shuffled" not in a


def test_questions_on_one_picture_stay_together_and_share_a_seed(dataset, tmp_path):
    calls = []

    class Noting(Seeing):
        def score(self, requests, candidates):
            calls.append([(str(r.messages[0]["content"][0].get("path")), r.seed) for r in requests])
            return super().score(requests, candidates)

    figures_of(dataset, tmp_path, Noting(dataset), tasks=["pope", "side"])
    flat = [c for call in calls for c in call]
    changes = sum(a[0] != b[0] for a, b in zip(flat, flat[1:]))
    assert changes + 1 == len({path for path, _ in flat}) == len(set(flat))


def test_what_is_asked_alike_is_answered_once(dataset, tmp_path):
    """The control of a caption is the caption of the other picture."""
    calls = []

    class Noting(Seeing):
        def generate(self, requests):
            calls.extend(str(r.messages[0]["content"]) for r in requests)
            return super().generate(requests)

    got = figures_of(dataset, tmp_path, Noting(dataset), tasks=["caption"])
    assert len(calls) == len(set(calls)) and got["caption_recall_seen"].control is not None
    rows = [json.loads(x) for x in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) > len(calls) == len({r["media"][0] for r in rows})
    by_picture = {r["media"][0]: r["answer"] for r in rows if not r["control"]}
    assert all(r["answer"] == by_picture[r["media"][0]] for r in rows if r["control"])


def test_portions_never_part_a_picture():
    items = [[f"p{i // 5}"] for i in range(40)]
    portions = media_portions(items, 7, lambda item: item)
    assert [j for p in portions for j in p] == items and len(portions) > 1
    assert not any({a[0] for a in p} & {b[0] for b in q} for p, q in zip(portions, portions[1:]))


def test_shares_hold_every_question_once_and_never_part_a_picture():
    asked = [Asked([], [f"p{i % 9}"], choices=["yes", "no"] if i % 3 else None) for i in range(60)]
    dealt = shares(asked, 4)
    assert sorted(i for share in dealt for i in share) == list(range(60)) and len(dealt) == 4
    for scored in (True, False):  # free answers take longest, so they are dealt out by themselves
        kinds = [{asked[i].media[0] for i in share if bool(asked[i].choices) == scored} for share in dealt]
        assert sum(map(len, kinds)) == len(set().union(*kinds))
        assert max(map(len, kinds)) - min(map(len, kinds)) <= 1
    assert shares(asked[:1], 3) == [[0]]


@pytest.mark.slow
def test_two_processes_answer_what_one_does(dataset, tmp_path):
    model, processor = tiny_model()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    from mmllm.cli.eval import command

    answers = []
    for nproc in ("1", "2"):
        out = tmp_path / nproc
        asks = ["--data", str(dataset), "--tasks", "pope,box", "--limit", "6", "--nproc", nproc, "--out", str(out)]
        done = CliRunner().invoke(command, ["--model", str(tmp_path / "model"), *asks])
        assert done.exit_code == 0, done.output
        answers.append([json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()])
    one, two = answers
    assert len(one) > 100 and [r["id"] for r in one] == [r["id"] for r in two]
    for a, b in zip(one, two, strict=True):
        assert a.get("scores") == pytest.approx(b.get("scores"), abs=1e-4)
        assert a["answer"] == b["answer"] or a["scores"][0] == pytest.approx(a["scores"][1], abs=1e-3)

    (tmp_path / "model" / "config.json").unlink()  # what a process of several says comes through in one line
    with pytest.raises(UserError, match="model"):
        run_eval(tmp_path / "model", dataset, ["pope"], limit=2, out=tmp_path / "bad", nproc=2)


def test_quick_on_cpu_scores_as_the_model_itself(dataset, tmp_path):
    model, processor = tiny_model()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    quick, own = load_decoder(tmp_path / "model"), Decoder(model.eval(), processor)
    kinds = {d.model.language_model.config._attn_implementation for d in (quick, own)}
    assert len(kinds) == 2
    scores = []
    for name, decoder in (("quick", quick), ("own", own)):
        run_eval(None, dataset, ["pope", "interleaved"], limit=6, out=tmp_path / name, decoder=decoder)
        lines = (tmp_path / name / "predictions.jsonl").read_text().splitlines()
        scores.append([json.loads(line)["scores"] for line in lines])
    assert len(scores[0]) > 50 and np.allclose(*scores, atol=1e-4)


def test_several_processes_with_nothing_to_answer(tmp_path):
    assert answer_in_processes(tmp_path, [], 2) == ([], [])  # one scene has no absent name to ask for


def test_gallery_is_drawn_by_seed_and_shows_truth_and_answer(dataset, tmp_path):
    figures_of(dataset, tmp_path, Seeing(dataset))
    items = gallery_items(tmp_path / "predictions.jsonl", scenes=4, sounds=2, seed=3)
    again = gallery_items(tmp_path / "predictions.jsonl", scenes=4, sounds=2, seed=3)
    assert items == again != gallery_items(tmp_path / "predictions.jsonl", scenes=4, sounds=2, seed=4)
    assert [i.kind for i in items] == ["image"] * 4 + ["audio"] * 2
    boxes = [b for i in items for b in i.boxes]
    assert {b[5] for b in boxes} == {"truth", "answer"}
    assert all(a.right for i in items for a in i.answered)


def test_compare_tells_a_leaning_from_blindness(dataset, tmp_path):
    from mmllm.cli.compare import command

    decoders = {"seeing": Seeing(dataset), "leaning": Seeing(dataset, lean=10), "blind": Blind(dataset)}
    got = {k: figures_of(dataset, tmp_path / k, d, tasks=["pope", "caption"]) for k, d in decoders.items()}
    verdicts = {}
    for other in ("leaning", "blind"):
        out = tmp_path / f"{other}.json"
        result = CliRunner().invoke(command, [str(tmp_path / "seeing"), str(tmp_path / other), "--out", str(out)])
        assert result.exit_code == 0 and "evaluated differently" not in result.output
        verdicts[other] = {f.name: f for f in read_figures(out)}
    lean, blind = verdicts["leaning"], verdicts["blind"]
    assert lean["pope_seen_random_accuracy_difference"].value == lean["pope_seen_random_accuracy_difference"].low == 0.5
    assert lean["pope_seen_adversarial_accuracy_difference"].verdict == "A better"
    assert lean["pope_seen_random_auc_difference"].value == 0
    assert lean["caption_seen_hit_ratio_difference"].verdict == "within the noise"
    assert {f.verdict for f in blind.values()} == {"A better"} and len(blind) == 14
    for figure, line in (("pope_accuracy_seen", "random_accuracy"), ("pope_auc_seen", "random_auc"),
                         ("pope_accuracy_seen_popular", "popular_accuracy")):  # fmt: skip
        arms = blind[f"pope_seen_{line}_difference"].arms
        assert arms == {"a": got["seeing"][figure].value, "b": got["blind"][figure].value}
    rows = [json.loads(x) for x in (tmp_path / "seeing" / "predictions.jsonl").read_text().splitlines()]
    assert all(r["id"].split(":")[-2 if r["task"] == "pope" else -1] == r["cluster"] for r in rows)


@pytest.mark.parametrize("nproc", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_several_methods_answer_as_each_does_alone(dataset, tmp_path, nproc):
    model, processor = tiny_model()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    from mmllm.cli.eval import command

    methods = {"greedy": "greedy", "vcd:alpha=0.5": "vcd_alpha=0.5"}
    asks = ["--model", str(tmp_path / "model"), "--data", str(dataset), "--tasks", "pope,caption", "--limit", "4"]
    both = [x for m in methods for x in ("--decode", m)]
    out = tmp_path / "both"
    done = CliRunner().invoke(command, [*asks, *both, "--nproc", nproc, "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in out.iterdir()) == sorted(methods.values())
    for method, folder in methods.items():
        alone = tmp_path / "alone" / folder
        done = CliRunner().invoke(command, [*asks, "--decode", method, "--out", str(alone)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert json.loads((out / folder / "results.json").read_text())["decode"] == method
        assert (out / folder / "trace.json").is_file() == (method != "greedy")
        files = [f / "predictions.jsonl" for f in (alone, out / folder)]
        rows = [[json.loads(x) for x in f.read_text().splitlines()] for f in files]
        assert [r["id"] for r in rows[0]] == [r["id"] for r in rows[1]]
        for a, b in zip(*rows, strict=True):
            assert a.get("scores") == pytest.approx(b.get("scores"), abs=1e-4)


def test_user_errors_of_the_command(dataset, tmp_path):
    with pytest.raises(UserError, match="did you mean 'pope'"):
        run_eval("model", dataset, ["popp"], out=tmp_path, decoder=Seeing(dataset))
    with pytest.raises(UserError, match="--align"):
        run_eval("model", dataset, ["retrieval"], out=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="nothing for task 'pope'"):
        run_eval("model", tmp_path / "empty", ["pope"], out=tmp_path, decoder=Seeing(dataset))
    from mmllm.cli.eval import command

    result = CliRunner().invoke(command, ["--data", str(dataset)])
    assert isinstance(result.exception, UserError) and "--model" in str(result.exception)
    twice = ["--model", "m", "--suite", "starter", "--decode", "greedy", "--decode", "vcd"]
    assert "--decode: benchmarks are decoded by one method" in str(CliRunner().invoke(command, twice).exception)
    many = ["vcd:alpha=1,beta=0.1", "vcd:beta=0.1,alpha=1"]  # two ways of writing one method are one
    assert len(run_evals(None, dataset, ["pope"], many, 2, tmp_path / "m", decoder=Seeing(dataset))) == 1


def test_a_method_leaves_its_trace_and_its_name(dataset, tmp_path):
    model, processor = tiny_model()
    decode = "vcd:step=900+ritual:transform=hflip,normalize=true"
    run_eval(None, dataset, ["pope"], decode, 4, tmp_path, shuffled=False, seed=5, decoder=Decoder(model, processor))
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["decode"], results["seed"]) == (decode, 5)
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert trace["decode"] == decode and list(trace["steps"][0]["views"]) == ["base", "diffuse", "hflip"]
