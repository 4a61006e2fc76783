"""The align stage end to end on a tiny world: it learns, writes a folder that loads, and names mistakes."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from PIL import Image

from mmllm.align import load_align, load_connector
from mmllm.config import parse_config
from mmllm.data.records import read_records
from mmllm.errors import UserError
from mmllm.report.figures import read_figures
from mmllm.report.runs import run_curves
from mmllm.train.align import AlignConfig, align


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, cache):
    monkeypatch.setenv("MMLLM_CACHE", str(cache))


def run(settings, out, **kwargs):
    return align(parse_config(settings, AlignConfig), out, **kwargs)


def test_run_learns_and_its_folder_loads(settings, world, tmp_path):
    out = run(settings, tmp_path / "run")
    figures = {f.name: f for f in read_figures(out / "final" / "results.json")}
    assert figures["things_r1"].value > 3 * figures["things_r1"].chance
    assert figures["sounds_r1"].value > 2 * figures["sounds_r1"].chance
    assert figures["regions"].value > figures["regions"].control_high
    assert figures["heard"].value > 2 * figures["heard"].chance
    assert 0 <= figures["kinds"].value <= 1 and figures["things_from_text_r5"].n == 8

    model = load_align(out)
    records = read_records(world / "things_val.jsonl")
    from mmllm.blocks.augment import place_cutout

    pictures = [place_cutout(Image.open(r["image"]), 64) for r in records]
    images = model.embed("image", pictures)
    torch.testing.assert_close(images.norm(dim=-1), torch.ones(len(records)))
    names = sorted({r["label"] for r in records})
    found = (images @ model.embed("text", names).T).argmax(1)
    hits = sum(names[int(k)] == r["label"] for k, r in zip(found, records)) / len(records)
    assert hits > 3 / 8  # names alone, without the second text that the measure averages in

    connector, about = load_connector(out, "vision")
    features = model.features("image", model.inputs("image", pictures[:2]))
    mine, theirs = connector.eval()(features)[0], model.connectors["image"](features)[0]
    assert torch.equal(mine, theirs) and mine.shape == (2, 16, 32)
    assert about["vocabulary"]["image"] == sorted(names) and load_connector(out, "audio")[1]["stream"] == "audio"
    assert not (out / "final" / "words").exists()

    page = (out / "report.html").read_text()
    for text in ("logit_scale/image:text", "gap/image:text", "learning_rate", "things_r1", "data:image/jpeg", "✓"):
        assert text in page
    near = {n["name"]: n for n in json.loads((out / "final" / "nearest.json").read_text())}
    assert len(near["things"]["queries"][0]["nearest"]) == 5 and near["sounds"]["queries"][0]["kind"] == "audio"
    curves = run_curves(out)
    assert curves["both", "logit_scale/image:text"][0][1] == pytest.approx(1 / 0.07, rel=0.1)


def test_interrupted_run_ends_as_an_uninterrupted_one(settings, tmp_path, monkeypatch):
    import mmllm.train.align as stage

    settings["measures"] = {}
    for phase in settings["phases"].values():
        phase["train"]["max_steps"] = 8
    settings["train"]["save_steps"] = 3
    whole = run(copy.deepcopy(settings), tmp_path / "whole")

    real = stage.AlignStage.train_phase

    def stop_in_second_phase(self, number, phase):
        if number == 1:
            raise KeyboardInterrupt
        return real(self, number, phase)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage.AlignStage, "train_phase", stop_in_second_phase)
        run(copy.deepcopy(settings), tmp_path / "cut")
    cut = run(copy.deepcopy(settings), tmp_path / "cut", resume=True)
    for name in ("image/model", "audio/model", "heads", "connector_image/model", "connector_audio/model"):
        one, two = (p / "final" / f"{name}.safetensors" for p in (whole, cut))
        assert one.read_bytes() == two.read_bytes(), name


def test_frozen_parts_do_not_change(settings, tmp_path):
    """BatchNorm statistics of a tower that does not train stay as they are, too."""
    from mmllm.train.align import AlignStage
    from mmllm.train.run import RunFolder

    settings["phases"]["both"]["train"]["max_steps"] = 2
    settings["phases"]["words"]["train"]["max_steps"] = 2
    config = parse_config(settings, AlignConfig)
    made = AlignStage(config, RunFolder.open(tmp_path / "run", "align", config))
    made.train_phase(0, config.phases["both"])
    before = {k: v.clone() for k, v in made.model.state_dict().items()}
    made.train_phase(1, config.phases["words"])
    changed = {k for k, v in made.model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(k.startswith(("connectors.image", "connectors.audio")) for k in changed)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("phases", "both", "sources", "things", "streams"), ["image", "txt"], "did you mean 'text'"),
        (("phases", "both", "objectives", 0, "type"), "infonse", "did you mean 'infonce'"),
        (("phases", "both", "objectives", 0, "options"), {"pair": ["image", "audio"]}, "needs stream 'audio'"),
        (("phases", "both", "objectives", 0, "options"), {"pair": ["image", "text"], "labels": 1}, "unknown option"),
        (("phases", "both", "trains"), ["image.haed"], "did you mean 'image.head'"),
        (("phases", "both", "sources", "things", "data"), "nothing.jsonl", "no such records file"),
        (("streams", "image", "tower"), None, "tower"),
        (("streams", "image", "hed"), {}, "unknown key"),
    ],
)
def test_mistakes_fail_before_training_with_one_line(settings, tmp_path, path, value, words):
    place = settings
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(UserError, match=words) as caught:
        run(settings, tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_packaged_config_is_valid():
    from mmllm.config import load_config

    config = load_config("configs/starter/align.yaml", [], AlignConfig)
    assert set(config.measures) >= {"retrieval_known_new_vendor", "retrieval_new_concept", "speech_real"}


def test_results_name_their_sources(settings, world, tmp_path):
    for phase in settings["phases"].values():
        phase["train"]["max_steps"] = 1
    settings["measures"] = {"things": settings["measures"]["things"]}
    (world / "dataset.json").write_text(json.dumps({"sources": [{"name": "drawn here"}]}))
    try:
        out = run(settings, tmp_path / "run")
    finally:
        (world / "dataset.json").unlink()
    assert json.loads((out / "final" / "results.json").read_text())["sources"] == [{"name": "drawn here"}]


def test_towers_train_as_their_spec_says(settings, world, tmp_path):
    """last_n of the pictures, adapters in the text encoder: nothing else moves, and final/ is plain folders."""
    from mmllm.towers import load_tower
    from mmllm.train.align import AlignStage
    from mmllm.train.run import RunFolder

    settings["streams"]["image"]["tower"] = {
        **settings["streams"]["image"]["tower"],
        "layers": 2,
        "train": {"last_n": 1},
    }
    settings["streams"]["text"]["tower"] = {
        "model": str(world / "text"),
        "train": {"lora": {"r": 2, "targets": ["query"]}},
    }
    del settings["phases"]["words"]
    phase = settings["phases"]["both"]
    phase |= {"trains": ["image.tower", "text.tower", "audio.head"], "train": {"max_steps": 2}}
    config = parse_config(settings, AlignConfig)
    made = AlignStage(config, RunFolder.open(tmp_path / "stage", "align", config))
    before = {k: v.clone() for k, v in made.model.state_dict().items()}
    made.train_phase(0, config.phases["both"])
    changed = {k for k, v in made.model.state_dict().items() if not torch.equal(v, before[k])}
    towers = {k.removeprefix("towers.") for k in changed if k.startswith("towers.")}
    assert {t.split(".")[0] for t in towers} == {"image", "text"}
    assert all(t.startswith(("image.encoder.layers.1.", "image.norm.")) or ".query.lora_" in t for t in towers)

    settings["measures"] = {}
    final = run(settings, tmp_path / "run") / "final"
    plain = load_tower(str(world / "text"), "text")
    trained = load_tower(str(final / "text"), "text")
    differ = {n for n, p in trained.named_parameters() if not torch.equal(p, plain.state_dict()[n])}
    assert differ == {"model.encoder.layer.0.attention.self.query.weight"}


def test_a_tower_that_is_frozen_by_its_spec_cannot_be_trained(settings, tmp_path):
    settings["streams"]["image"]["tower"]["train"] = "none"
    with pytest.raises(UserError, match="'image.tower' is frozen by its own 'train: none'"):
        run(settings, tmp_path / "run")


def test_folders_from_before_the_limit_of_the_scale_was_saved(settings, tmp_path):
    settings["measures"] = {}
    for phase in settings["phases"].values():
        phase["train"]["max_steps"] = 1
    final = run(settings, tmp_path / "run") / "final"
    info = json.loads((final / "align.json").read_text())
    assert info.pop("max_logit_scale") == 100.0
    (final / "align.json").write_text(json.dumps(info))
    model = load_align(final)
    model.logit_scale["image:text"].data.fill_(9.0)
    assert float(model.scale("image:text")) == 100.0
    model.max_logit_scale = None
    assert float(model.scale("image:text")) > 8000
