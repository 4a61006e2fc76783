"""Controls beside every figure, from the real tiny model and from fixed answers."""

import json

import pytest
from tiny_mm import tiny_model

from mmllm.decode import Decoder
from mmllm.errors import UserError
from mmllm.evaluate.benchmarks.controls import control_kinds
from mmllm.evaluate.benchmarks.runner import run_benchmarks
from mmllm.report.figures import read_figures


@pytest.fixture(scope="module")
def decoder():
    net, processor = tiny_model()
    return Decoder(net.eval(), processor)


@pytest.fixture
def pope(tmp_path, make):
    root = tmp_path / "pope"
    things = ["cat", "dog", "fox", "owl", "cow", "bee"]
    make.dump_lines(root / "coco_pope_random.json", [
        {"question_id": i, "image": f"{i // 3}.png", "text": f"Is there a {x} in the image?",
         "label": "yes" if i % 3 == 0 else "no"} for i, x in enumerate(things)])  # fmt: skip
    for i in range(2):
        make.draw(root / f"{i}.png")
    return root


def test_all_three_controls_stand_beside_the_model(pope, decoder, tmp_path):
    out = tmp_path / "out"
    run_benchmarks(None, pope, ["pope"], out=out, decoder=decoder, control=["always_yes", "blind", "shuffled"])
    found = {f.name: f for f in read_figures(out / "results.json")}
    accuracy, f1 = found["pope_random_accuracy"], found["pope_random_f1"]
    assert set(accuracy.controls) == {"shuffled", "blind", "always_yes"} == set(f1.controls)
    assert accuracy.controls["always_yes"]["value"] == pytest.approx(1 / 3)
    assert f1.controls["always_yes"]["value"] == pytest.approx(2 * 2 / (6 + 2))
    assert accuracy.controls["shuffled"]["value"] == accuracy.control  # the first one is the figure's control
    assert accuracy.controls["blind"]["n"] == 6 and "pope_random_accuracy_over_shuffled" in found
    rows = [json.loads(x) for x in (out / "predictions.jsonl").read_text().splitlines()]
    kinds = [r["control_kind"] for r in rows]
    assert {k: kinds.count(k) for k in set(kinds)} == {None: 6, "shuffled": 6, "blind": 6}
    blind = [r for r in rows if r["control_kind"] == "blind"]
    assert sum(r["hit"] for r in blind) / 6 == accuracy.controls["blind"]["value"]
    assert json.loads((out / "results.json").read_text())["control"] == "shuffled+blind+always_yes"


def test_always_yes_alone_asks_nothing_more(pope, decoder, tmp_path):
    out = tmp_path / "out"
    run_benchmarks(None, pope, ["pope"], out=out, decoder=decoder, control="always_yes", margins=False)
    assert len((out / "answers.jsonl").read_text().splitlines()) == 6
    figure = next(f for f in read_figures(out / "results.json") if f.name == "pope_random_accuracy")
    assert figure.control is None and list(figure.controls) == ["always_yes"]


def test_always_yes_is_understood_in_every_style(pope, decoder, tmp_path):
    for style in ("official", "lmms", "vlmevalkit", "scored"):
        out = tmp_path / style
        run_benchmarks(None, pope, ["pope"], style, out=out, decoder=decoder, control="always_yes")
        figure = next(f for f in read_figures(out / "results.json") if f.name == "pope_random_recall")
        assert figure.controls["always_yes"]["value"] == 1


def test_letters_have_no_always_yes(decoder, tmp_path, make):
    root = tmp_path / "seed"
    choices = {f"choice_{x}": x for x in "abcd"}
    rows = [{"question_id": i, "data_id": f"{i}.png", "question": "Which?", **choices, "answer": "A"} for i in range(2)]
    make.dump(root / "SEED-Bench.json", {"questions": rows})
    for i in range(2):
        make.draw(root / "SEED-Bench-image" / f"{i}.png")
    run_benchmarks(None, root, ["seed"], out=tmp_path / "out", decoder=decoder, control="shuffled+always_yes")
    figure = next(f for f in read_figures(tmp_path / "out" / "results.json") if f.name == "seed_accuracy")
    assert list(figure.controls) == ["shuffled"]


def test_names_of_controls():
    assert control_kinds("none") == [] and control_kinds("blind") == ["blind"]
    assert control_kinds(["always_yes", "shuffled"]) == ["shuffled", "always_yes"]
    with pytest.raises(UserError, match="unknown control"):
        control_kinds("deaf")
