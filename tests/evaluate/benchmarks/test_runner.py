"""`mmllm eval` on benchmark files with a real tiny model: results, going on after a stop, wrong folders."""

import base64
import json

import pytest
from click.testing import CliRunner
from tiny_mm import tiny_model

from mmllm.decode import Decoder
from mmllm.errors import UserError
from mmllm.evaluate.benchmarks.runner import run_benchmarks
from mmllm.report.figures import read_figures


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a tiny model, saved as a trained one is."""
    folder = tmp_path_factory.mktemp("model")
    net, processor = tiny_model()
    net.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path, make):
    """One benchmark of each kind: yes/no, letters, boxes, captions of pictures and of sounds."""
    root = tmp_path / "data"
    for kind in ("random", "popular"):
        make.dump_lines(root / "pope" / f"coco_pope_{kind}.json", [
            {"question_id": i, "image": f"{i // 2}.png", "text": f"Is there a {thing} in the image?",
             "label": ("yes", "no")[i % 2]} for i, thing in enumerate(["cat", "dog", kind, "fox"])])  # fmt: skip
    picture = base64.b64encode(make.draw(root / "pope" / "0.png").read_bytes()).decode()
    make.draw(root / "pope" / "1.png")
    (root / "mmbench").mkdir()
    (root / "mmbench" / "dev.tsv").write_text(
        f"index\tquestion\thint\tA\tB\tanswer\tcategory\timage\n3\tWhat?\t\tcat\tdog\tB\tx\t{picture}\n")  # fmt: skip
    sentences = [{"sent_id": 1, "sent": "cat"}]
    make.dump(root / "refcoco" / "refs(unc).json",
              [{"ref_id": 1, "ann_id": 5, "image_id": 7, "split": "val", "sentences": sentences}])  # fmt: skip
    make.dump(root / "refcoco" / "instances.json", {
        "images": [{"id": 7, "width": 10, "height": 10, "file_name": "7.png"}],
        "annotations": [{"id": 5, "bbox": [1, 1, 5, 5]}]})  # fmt: skip
    make.draw(root / "refcoco" / "train2014" / "7.png")
    (root / "clotho").mkdir()
    lines = ["file_name,caption_1,caption_2", "a.wav,a dog barks,barking of a dog", "b.wav,rain falls,it rains"]
    (root / "clotho" / "clotho_captions_evaluation.csv").write_text("\n".join(lines) + "\n")
    for name in "ab":
        make.play(root / "clotho" / "evaluation" / f"{name}.wav")
    return root


TASKS = ["pope", "mmbench", "refcoco", "clotho"]


def lines(path):
    return [json.loads(x) for x in path.read_text().splitlines()]


class Counting:
    """The real decoder, counting what it is asked, and stopping with an error after ``most`` answers."""

    def __init__(self, model, most=None):
        from mmllm.model import load_model

        self.inner, self.most, self.asked = Decoder(*load_model(str(model))), most, []

    def _note(self, requests, kind):
        if self.most is not None and len(self.asked) + len(requests) > self.most:
            raise KeyboardInterrupt
        self.asked += [(kind, r.messages[0]["content"][-1]["text"]) for r in requests]

    def generate(self, requests):
        self._note(requests, "free")
        return self.inner.generate(requests)

    def score(self, requests, candidates):
        self._note(requests, "scored")
        return self.inner.score(requests, candidates)


def test_the_command_on_one_benchmark_of_each_kind(model, data, tmp_path):
    from mmllm.cli.eval import command

    out = tmp_path / "out"
    args = ["--model", str(model), "--data", str(data), "--tasks", ",".join(TASKS), "--out", str(out)]
    result = CliRunner().invoke(command, args, catch_exceptions=False)
    assert result.exit_code == 0 and "pope_random_accuracy" in result.output and "mmbench_circular" in result.output
    results = json.loads((out / "results.json").read_text())
    assert results["styles"] == {"pope": "official", "mmbench": "official", "refcoco": "llava", "clotho": "official"}
    assert results["weights"] and results["decode"] == "greedy" and results["tasks"]["clotho"]["max_new_tokens"] == 64
    names = {f.name for f in read_figures(out / "results.json")}
    assert {"pope_random_auc", "pope_unparsed", "mmbench_circular", "mmbench_unparsed", "refcoco_val_iou50",
            "clotho_cider_d"} <= names and "clotho_unparsed" not in names  # fmt: skip
    rows = lines(out / "predictions.jsonl")
    assert {r["task"] for r in rows} == set(TASKS) and {r["control"] for r in rows} == {True, False}
    for row in rows:
        assert {"prompt", "answer", "parsed", "unparsed", "gold", "margin", "split", "cluster", "hit"} <= set(row)
        assert (row["margin"] is not None) == (row["task"] in ("pope", "mmbench"))
    pope = next(r for r in rows if r["task"] == "pope")
    assert pope["margin"] == pytest.approx(pope["scores"][0] - pope["scores"][1], abs=1e-4)
    unparsed = next(f for f in read_figures(out / "results.json") if f.name == "mmbench_unparsed")
    assert unparsed.value == sum(r["unparsed"] for r in rows if r["task"] == "mmbench" and not r["control"]) / 2


def test_a_stopped_run_goes_on_and_asks_nothing_twice(model, data, tmp_path, monkeypatch):
    from mmllm.evaluate.benchmarks import runner

    monkeypatch.setattr(runner, "GENERATE_PORTION", 2)
    monkeypatch.setattr(runner, "SCORE_PORTION", 2)
    whole, cut, rest = Counting(model), Counting(model, most=5), Counting(model)
    run_benchmarks(model, data, TASKS, out=tmp_path / "whole", decoder=whole)
    with pytest.raises(KeyboardInterrupt):
        run_benchmarks(model, data, TASKS, out=tmp_path / "cut", decoder=cut)
    kept = tmp_path / "cut" / "answers.jsonl"
    assert cut.asked and not (tmp_path / "cut" / "results.json").exists()
    with kept.open("a") as f:
        f.write('{"task": "pope", "spl')  # what a kill in the middle of a line leaves
    run_benchmarks(model, data, TASKS, out=tmp_path / "cut", decoder=rest)
    assert sorted(cut.asked + rest.asked) == sorted(whole.asked)
    told = [(tmp_path / name / "predictions.jsonl").read_text().replace(f"/{name}/media/", "/media/")
            for name in ("cut", "whole")]  # fmt: skip
    assert told[0] == told[1]
    # With all answers there, the model is not even loaded: nobody is asked, and the figures are the same.
    nobody = run_benchmarks(model, data, TASKS, out=tmp_path / "cut", decoder=Counting(model, most=0))
    assert nobody == run_benchmarks(model, data, TASKS, out=tmp_path / "whole", decoder=Counting(model, most=0))


def test_questions_that_splits_share_are_asked_once(model, data, tmp_path):
    decoder = Counting(model)
    run_benchmarks(model, data, ["pope"], out=tmp_path / "out", decoder=decoder, control="none", margins=False)
    assert len(decoder.asked) == 5  # cat, dog and fox of both files, and one thing of each file alone
    assert len(lines(tmp_path / "out" / "predictions.jsonl")) == 8
    # Margins can be had afterwards, without generating again.
    more = Counting(model)
    figures = run_benchmarks(model, data, ["pope"], out=tmp_path / "out", decoder=more, control="none")
    assert {kind for kind, _ in more.asked} == {"scored"} and "pope_random_auc" in {f.name for f in figures}


def test_scored_style_generates_nothing(model, data, tmp_path):
    decoder = Counting(model)
    run_benchmarks(model, data, ["pope", "mmbench"], "scored", out=tmp_path / "out", decoder=decoder, control="none")
    rows = lines(tmp_path / "out" / "predictions.jsonl")
    assert {kind for kind, _ in decoder.asked} == {"scored"} and not any(r["unparsed"] for r in rows)
    assert all((r["margin"] > 0) == (r["answer"] == "yes") for r in rows if r["task"] == "pope")


def test_further_tasks_join_the_folder(model, data, tmp_path):
    decoder = Counting(model)
    first = run_benchmarks(model, data, ["pope"], out=tmp_path / "out", decoder=decoder, control="none")
    second = run_benchmarks(model, data, ["clotho"], out=tmp_path / "out", decoder=decoder, control="none")
    assert read_figures(tmp_path / "out" / "results.json") == [*first, *second]
    assert {r["task"] for r in lines(tmp_path / "out" / "predictions.jsonl")} == {"pope", "clotho"}


def test_folders_of_another_model_style_or_decoding_are_refused(model, data, tmp_path):
    out, decoder = tmp_path / "out", Counting(model)

    def run(path=model, style=None, decode="greedy", seed=0):
        return run_benchmarks(path, data, ["pope"], style, decode, None, out, "none", seed, False, decoder=decoder)

    run()
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    other = tmp_path / "other"
    net, processor = tiny_model(seed=1)
    net.save_pretrained(other)
    for arguments, message in (({"path": other}, "holds answers of model .*, not .*other; give another --out"),
                               ({"style": "lmms"}, "holds pope in style official, not lmms"),
                               ({"decode": "vcd:alpha=1"}, "holds answers of decode greedy, not vcd"),
                               ({"seed": 3}, "holds answers of seed 0, not 3")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            run(**arguments)
    assert before == {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}


def test_other_folders_and_other_questions_are_refused(model, data, tmp_path, make):
    decoder, out = Counting(model), tmp_path / "out"
    other = tmp_path / "starter"
    make.dump(other / "results.json", {"figures": []})
    with pytest.raises(UserError, match="results of another command; give another --out"):
        run_benchmarks(model, data, ["pope"], out=other, decoder=decoder)
    run_benchmarks(model, data, ["pope"], out=out, decoder=decoder, control="none", margins=False)
    path = data / "pope" / "coco_pope_random.json"
    path.write_text(path.read_text().replace("a cat", "a lion"))
    with pytest.raises(UserError, match="pope: item 0 was another question before"):
        run_benchmarks(model, data, ["pope"], out=out, decoder=decoder, control="none", margins=False)


def test_limit_takes_pictures_of_every_split(model, data, tmp_path):
    run_benchmarks(model, data, ["pope"], out=tmp_path / "out", decoder=Counting(model), limit=1, margins=False)
    real = [r for r in lines(tmp_path / "out" / "predictions.jsonl") if not r["control"]]
    assert [(r["split"], r["id"]) for r in real] == [(s, i) for s in ("random", "popular") for i in "01"]


def test_the_blind_control_shows_nothing(model, data, tmp_path):
    out, decoder = tmp_path / "out", Counting(model)
    run_benchmarks(model, data, ["pope"], out=out, decoder=decoder, margins=False)
    figures = run_benchmarks(model, data, ["pope"], out=out, decoder=decoder, control="blind", margins=False)
    blind = {f.name: f for f in figures}
    assert len(decoder.asked) == 5 + 5 + 5  # the questions themselves are not asked again
    assert "control: no media" in blind["pope_random_accuracy"].note and "pope_random_accuracy_over_blind" in blind
    rows = [r for r in lines(out / "predictions.jsonl") if r["control"]]
    assert rows and all(r["media"] == [] for r in rows)
    assert json.loads((out / "results.json").read_text())["control"] == "blind"


def test_compare_reads_the_predictions_and_tells_styles_apart(model, data, tmp_path):
    from mmllm.evaluate.compare import compare_runs

    for style in ("official", "lmms"):
        run_benchmarks(model, data, ["pope"], style, out=tmp_path / style, decoder=Counting(model), control="none")
    found = compare_runs(tmp_path / "official", tmp_path / "lmms")
    names = {f"pope_{s}_{m}" for s in ("random", "popular") for m in ("accuracy", "auc")}
    assert {c.name for c in found.lines} == names
    assert any("styles" in note for note in found.notes)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--tasks", "popp"], "did you mean 'pope'"),
        (["--tasks", "mme,caption"], "mme is a benchmark and caption is not"),
        (["--tasks", "pope"], "nothing to measure"),
        (["--tasks", "caption", "--style", "lmms", "--model", "x"], "--style: this is for benchmarks"),
        (["--tasks", "pope", "--style", "offical", "--model", "x"], "unknown style of pope 'offical'; did you mean"),
        (["--tasks", "mme", "--model", "x"], "mme: no existence/questions_answers_YN"),
        (["--tasks", "pope", "--align", "x"], "pope asks questions, and an align run answers none"),
        (["--tasks", "pope", "--align", "x", "--model", "x"], "a model and an align run at once"),
    ],
)
def test_user_errors_of_the_command(data, args, message):
    from mmllm.cli.eval import command

    result = CliRunner().invoke(command, ["--data", str(data), *args])
    assert isinstance(result.exception, UserError) and message in str(result.exception)


def test_the_list_of_benchmarks():
    from mmllm.cli.eval import command

    result = CliRunner().invoke(command, ["--list"])
    assert result.exit_code == 0 and "mme\tofficial, llava, lmms, scored\t" in result.output


def test_a_dataset_folder_still_goes_the_old_way(tmp_path):
    from mmllm.evaluate.benchmarks.select import are_benchmarks

    assert not are_benchmarks(["pope"], "starter:full", None) and are_benchmarks(["mme"], "starter:full", None)
    (tmp_path / "dataset.json").write_text("{}")
    assert not are_benchmarks(["pope"], str(tmp_path), None) and are_benchmarks(["pope"], str(tmp_path), "lmms")
    (tmp_path / "dataset.json").unlink()
    assert are_benchmarks(["pope"], str(tmp_path), None)
