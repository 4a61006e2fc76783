"""The page of an eval run: what is on it, how much of it, and that nothing is fetched or run."""

import json
import re

import pytest
from PIL import Image

from mmllm.errors import UserError
from mmllm.evaluate.page import box_of, spread, write_eval_report
from mmllm.report.bars import bars_svg, controlled_html
from mmllm.report.figures import Figure, write_figures


def row(task, number, hit, **more):
    base = {"task": task, "id": str(number), "split": "val", "control": False, "hit": hit, "weight": 1.0,
            "question": f"q{number}", "answer": f"a{number}", "gold": "yes", "media": []}  # fmt: skip
    return {**base, **more}


@pytest.fixture
def folder(tmp_path):
    import soundfile

    Image.new("RGB", (40, 20), "red").save(tmp_path / "p.png")
    soundfile.write(tmp_path / "s.wav", [0.0] * 800, 16000)
    picture, sound = str(tmp_path / "p.png"), str(tmp_path / "s.wav")
    rows = [row("pope", i, i % 2, media=[picture], parsed="no", unparsed=False, prompt=f"ask {i} <b>", margin=0.5,
                split=("random", "popular")[i % 4 // 2]) for i in range(60)]  # fmt: skip
    rows += [row("pope", 99, 0, control=True, prompt="CONTROL", media=[picture], parsed="no")]
    rows += [row("refcoco", 1, 0, media=[picture], gold=[0.1, 0.2, 0.5, 0.6], parsed=[0.3, 0.3, 0.9, 0.9],
                 prompt="where?", question="cat")]  # fmt: skip
    rows += [row("esc50", 1, 0, media=[sound], gold="dog", parsed=None, unparsed=True, prompt="which?")]
    rows += [row("clotho", i, 0.1 * i, media=[str(tmp_path / "gone.wav")], gold=["rain falls"], parsed=f"a{i}",
                 prompt="Describe") for i in range(20)]  # fmt: skip
    rows += [row("seed", 1, 0, gold="B", parsed="A", meta={"options": {"A": "cat", "B": "dog"}, "kind": "Identity"})]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    controls = {"shuffled": {"value": 0.4}, "always_yes": {"value": 0.5}}
    figures = {
        "pope": [Figure("pope_random_accuracy", 0.75, low=0.7, high=0.8, n=60, unit="fraction", chance=0.5, control=0.4,
                        controls=controls), Figure("pope_random_accuracy_over_shuffled", 0.3)],
        "clotho": [Figure("clotho_cider_d", 0.4, unit="CIDEr-D")],
        "refcoco": [Figure("refcoco_val_iou50", 0.0)], "esc50": [Figure("esc50_accuracy", 0.0)],
        "seed": [Figure("seed_accuracy", 0.0)],
    }  # fmt: skip
    tasks = {k: {"style": "official", "note": None, "max_new_tokens": 16, "items": 1, "unparsed": 0,
                 "media_left_out": 0, "figures": [f.name for f in v]} for k, v in figures.items()}  # fmt: skip
    write_figures(tmp_path / "results.json", "mmllm eval", 0, {}, [], [f for v in figures.values() for f in v],
                  tasks=tasks, model="runs/tune")  # fmt: skip
    return tmp_path


def part(text, heading):
    return next(x for x in text.split("<section>") if f"<h2>{heading}</h2>" in x)


def test_what_the_page_shows(folder):
    text = write_eval_report(folder).read_text()
    assert "<script" not in text and not re.search(r'(src|href)="(?!data:)', text)
    pope = part(text, "pope")
    assert pope.count('class="card"') == 12 and "12 of 30 wrong answers (60 items)" in pope
    assert "random: 6 of 15" in pope and "popular: 6 of 15" in pope and "CONTROL" not in text
    assert "&lt;b&gt;" in pope and "<b>" not in pope and pope.count("data:image/jpeg") == 12
    assert "always yes" in pope and "other media" in pope and "random_accuracy" in pope
    refcoco = part(text, "refcoco")
    assert refcoco.count("stroke-dasharray") == 1 and 'stroke="#10b981"' in refcoco  # the answer's box and the true one
    esc50 = part(text, "esc50")
    assert "data:audio/wav" in esc50 and "not understood" in esc50
    clotho = part(text, "clotho")
    assert "the 12 lowest scores of 20" in clotho and "file is gone: gone.wav" in clotho and "1.900" not in clotho
    assert "A: cat" in part(text, "seed") and "B: dog" in part(text, "seed")


def test_the_same_page_twice_and_fewer_cards(folder):
    first = write_eval_report(folder).read_text()
    assert write_eval_report(folder).read_text() == first
    few = write_eval_report(folder, per_task=2).read_text()
    assert part(few, "pope").count('class="card"') == 2 and part(few, "clotho").count('class="card"') == 2


def test_the_command_writes_it_anew(folder):
    from click.testing import CliRunner

    from mmllm.cli.report import command

    page = folder / "mine.html"
    result = CliRunner().invoke(command, [str(folder), "--out", str(page)], catch_exceptions=False)
    assert result.exit_code == 0 and "12 of 30 wrong answers" in page.read_text()


def test_bars_are_as_long_as_their_values():
    figures = [Figure("a_x", 0.25, unit="fraction"), Figure("a_y", 100, unit="points", chance=75),
               Figure("a_sum", 900, unit="points", chance=225), Figure("a_over_shuffled", 0.1)]  # fmt: skip
    svg = bars_svg(figures, "a")
    widths = [float(w) for w in re.findall(r'width="([\d.]+)" height="14" fill="#2563eb"', svg)]
    assert widths == [105, 210] and ">x<" in svg and ">y<" in svg and "sum" not in svg
    assert bars_svg([Figure("a", None)]) == ""


def test_the_table_has_a_column_per_control():
    table = controlled_html([Figure("a", 0.5, controls={"blind": {"value": 0.25}}), Figure("b", 0.5, control=0.125)])
    assert [x for x in re.findall("<th>([^<]*)</th>", table)] == [
        "figure", "value", "95 % interval", "other media", "no media", "chance", "n"]  # fmt: skip
    assert "25.0 %" in table and "12.5 %" in table


def test_items_come_from_every_kind():
    rows = [row("t", i, 0, split="many") for i in range(50)] + [row("t", 99, 0, split="rare")]
    assert [r["split"] for r in spread(rows, 3, 0)].count("rare") == 1


def test_boxes():
    assert box_of([0.1, 0.1, 0.2, 0.3]) == (0.1, 0.1, 0.2, 0.3)
    for wrong in ("yes", ["a", "b", "c", "d"], [0.5, 0.1, 0.2, 0.3], [1, 2, 3, 4], [True, True, False, True], None):
        assert box_of(wrong) is None


def test_bad_input(folder, tmp_path):
    (folder / "predictions.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="not a line of mmllm eval"):
        write_eval_report(folder)
    (folder / "results.json").unlink()
    with pytest.raises(UserError, match="no such results file"):
        write_eval_report(folder)
