"""The page stands alone, escapes what it is given, draws boxes where they are, and survives cut-off logs."""

import json
import re

from PIL import Image

from mmllm.report.figures import Figure
from mmllm.report.html import Answered, Item, curve_svg, picture_svg, read_curves, write_report


def picture(path, size=(64, 64)):
    Image.new("RGB", size, (200, 30, 30)).save(path)
    return str(path)


def test_page_is_self_contained_and_escaped(tmp_path):
    (tmp_path / "s.wav").write_bytes(b"RIFF0000WAVE")
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"phase":"a","step":1,"loss":2.5}\n{"phase":"a","step":2,"loss":1.5}\n{"phase":"a","st')
    item = Item("s1", [picture(tmp_path / "a.png")], answered=[Answered("Is <b> there?", "yes", "no", False)])
    sound = Item("s2", [str(tmp_path / "s.wav")], "audio", [Answered("What do you hear?", "a cat", "a cat", True)])
    gone = Item("s3", [str(tmp_path / "gone.png")])
    page = write_report(
        tmp_path / "report.html", "A <title>", {"Figures": [Figure("pope", 0.75, note='say "x"')]},
        {"tune": metrics, "absent": tmp_path / "no.jsonl"}, [item, sound, gone], {"seed": 0}, ["mmllm chat runs/a & b"],
    ).read_text()  # fmt: skip
    assert "<b>" not in page and "Is &lt;b&gt; there?" in page and "a &amp; b" in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 2 and all(s.startswith("data:") for s in sources)
    assert "<script" not in page and "file is gone: gone.png" in page
    assert 'class="wrong">yes' in page and 'class="right">a cat' in page and "75.0 %" in page and "tune · a" in page


def test_boxes_stand_at_their_place(tmp_path):
    svg = picture_svg(picture(tmp_path / "a.png", (300, 100)), [(0.25, 0.5, 0.75, 1.0, "cat", "truth")])
    assert 'x="64.0" y="128.0" width="128.0" height="128.0"' in svg and ">cat<" in svg


def test_curves_by_phase_and_only_losses(tmp_path):
    rows = [{"phase": "p", "step": s, "loss": 1 / s, "loss_region": 2.0, "lr": 0.1} for s in (1, 2, 4)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"step": 5, "loss": 1.0}])))
    curves = read_curves(tmp_path / "m.jsonl")
    assert curves == {
        "p": {"loss": [(1, 1), (2, 0.5), (4, 0.25)], "loss_region": [(1, 2), (2, 2), (4, 2)]},
        "": {"loss": [(5, 1)]},
    }
    svg = curve_svg("t", curves["p"])
    points = re.findall(r'polyline points="([^"]*)"', svg)[0].split()
    xs = [float(p.split(",")[0]) for p in points]
    assert len(points) == 3 and xs[0] < xs[1] < xs[2] and abs((xs[2] - xs[0]) - 3 * (xs[1] - xs[0])) < 0.3
    assert "nothing logged" in curve_svg("t", {"loss": [(1, float("nan"))]})
