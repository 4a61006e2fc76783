"""Task retrieval: an align run's own figures on its dataset; anything else is computed or refused."""

import json

import pytest
import torch
from PIL import Image

from mmllm.errors import UserError
from mmllm.evaluate.alignment import retrieval_on
from mmllm.evaluate.run import run_eval
from mmllm.report.figures import Figure, write_figures


def test_figures_of_the_run_itself_on_its_own_dataset(tmp_path):
    data, final = tmp_path / "data", tmp_path / "run" / "final"
    data.mkdir()
    final.mkdir(parents=True)
    (final / "align.json").write_text(json.dumps({"dataset": str(data), "pairs": [], "streams": {}}))
    written = [Figure("retrieval_new_concept_r1", 0.16, low=0.1, high=0.2, n=185, chance=0.005)]
    write_figures(final / "results.json", "mmllm align", 0, {}, [], written)
    got = run_eval(None, data, ["retrieval"], align=tmp_path / "run", out=tmp_path / "out")
    assert got == written and (tmp_path / "out" / "results.json").is_file()
    with pytest.raises(UserError, match="no aligned model"):
        run_eval(None, data, ["retrieval"], align=data, out=tmp_path / "out")


def test_retrieval_both_ways_with_several_pictures_of_one_name(tmp_path):
    names = ["ant", "bee", "cow", "dog", "elk", "fox"]
    records = []
    for i in range(12):
        Image.new("RGB", (4, 4), (i % 6, 0, 0)).save(tmp_path / f"{i}.png")
        records.append(
            {"id": str(i), "image": str(tmp_path / f"{i}.png"), "text": [names[i % 6]], "label": names[i % 6]}
        )

    class Model:
        """Places a picture at the unit vector of its red value, a name at that of its number."""

        def embed(self, stream, items):
            rows = [names.index(x) if isinstance(x, str) else x.getpixel((0, 0))[0] for x in items]
            return torch.eye(6)[rows]

    figures = {f.name: f for f in retrieval_on(Model(), "image", "text", records, "image", "r", 0)}
    assert figures["r_r1"].value == 1 and figures["r_r1"].n == 12 and figures["r_r1"].chance == pytest.approx(1 / 6)
    assert figures["r_from_text_r1"].value == 1 and figures["r_from_text_r1"].n == 6
    assert figures["r_r1"].control < 0.5
