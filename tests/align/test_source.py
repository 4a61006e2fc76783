"""Sources of an align run: any format and sampler, captions, transforms, and items that cannot be used."""

from __future__ import annotations

import copy
import csv
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from mmllm.align.live import LiveItems
from mmllm.config import parse_config
from mmllm.data.media import load_image
from mmllm.data.rejected import Rejected
from mmllm.errors import UserError
from mmllm.towers import image_inputs
from mmllm.train.align import AlignConfig, AlignStage, align
from mmllm.train.align_check import check_config
from mmllm.train.run import RunFolder


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def broken(world, tmp_path):
    """The tiny world's training things and sounds, of which one picture and one sound cannot be decoded."""
    for kind, folder in (("things", "png"), ("sounds", "wav")):
        rows = [json.loads(line) for line in (world / f"{kind}_train.jsonl").read_text().splitlines()]
        field = "image" if kind == "things" else "audio"
        for row in rows:
            row[field] = str(world / row[field])
        (tmp_path / f"bad.{folder}").write_text("no media")
        rows[3][field] = f"bad.{folder}"
        (tmp_path / f"{kind}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def source_of(settings, source, name="things", run=None, objectives=(), trains=None):
    """One source of a stage that trains the picture tower, with ``source`` over its settings."""
    settings = copy.deepcopy(settings)
    settings["phases"]["both"]["sources"][name] |= source
    stage = AlignStage(parse_config(settings, AlignConfig), run)
    spec = stage.config.phases["both"].sources[name]
    want = {s: {"embedding"} for s in spec.streams}
    training = {"image", "audio"} if trains is None else trains
    return stage._source(name, spec, want, training, 0, 8, "contrasts" in objectives)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# ---- what cannot be used ----


@pytest.mark.parametrize("trains", [set(), {"image"}], ids=["frozen", "training"])
def test_an_unreadable_picture_is_left_out_and_listed(settings, broken, tmp_path, trains):
    settings["data"] = {"max_rejected": 0.1, "workers": 2}
    run = RunFolder.open(tmp_path / "run", "align", parse_config(settings, AlignConfig))
    data = {"data": str(broken / "things.jsonl"), "sampler": "shuffle"}
    for _ in range(2):  # the second time a frozen tower's features come from the cache
        source = source_of(settings, data, run=run, trains=trains)
        batches = [source.batch(s) for s in range(8)]
        ids = [i for b in batches for i in b["ids"]]
        bad = source.records[3]["id"]
        assert bad not in ids and len(ids) == 64 and len(set(ids)) == 31
        assert all(len(b["ids"]) == 8 for b in batches)
        row = json.loads((run.path / "rejected.jsonl").read_text())
        assert row["id"] == bad and row["where"].endswith("bad.png") and "not a picture" in row["why"]
    again = source_of(settings, data, trains=trains)
    assert same(again.batch(5), batches[5])  # without the batches before it, as after a resume


@pytest.mark.parametrize("trains", [set(), {"audio"}], ids=["frozen", "training"])
def test_an_unreadable_sound_is_left_out_and_listed(settings, broken, trains):
    settings["data"] = {"max_rejected": 0.1}
    source = source_of(settings, {"data": str(broken / "sounds.jsonl")}, "sounds", trains=trains)
    assert source.rejected.count("sounds") == 1 and len(source.usable) == 31 and 3 not in source.usable


def test_too_many_rejected_items_stop_the_run_with_their_list(settings, broken, tmp_path):
    settings["phases"]["both"]["sources"]["things"] |= {"data": str(broken / "things.jsonl"), "sampler": "shuffle"}
    with pytest.raises(UserError, match=r"source 'things': 1 of 32 items .*bad.png: not a picture") as caught:
        align(parse_config(settings, AlignConfig), tmp_path / "run")
    # The list stays, and nothing else: the next start may take the same folder.
    assert "rejected.jsonl" in str(caught.value) and [p.name for p in (tmp_path / "run").iterdir()] == [
        "rejected.jsonl"
    ]
    settings["data"] = {"max_rejected": 0.05}
    RunFolder.open(tmp_path / "run", "align", parse_config(settings, AlignConfig))


def test_a_run_skips_what_it_cannot_use_and_finishes(settings, world, tmp_path):
    rows = (world / "things_train.jsonl").read_text().splitlines()
    long = json.loads(rows[0]) | {"id": "long", "text": "red " * 40}
    data = [*rows, json.dumps(long), json.dumps({"id": "none", "text": "red square"}), '{"cut']
    (world / "mixed.jsonl").write_text("\n".join(data))
    settings["phases"] = {"both": settings["phases"]["both"]}
    settings["phases"]["both"]["sources"]["things"]["data"] = "mixed.jsonl"
    settings["phases"]["both"]["train"]["max_steps"] = 2
    settings["measures"] = {}
    settings["data"] = {"max_rejected": 0.1}
    out = align(parse_config(settings, AlignConfig), tmp_path / "run")
    listed = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [r["where"].rsplit(":", 1)[1] for r in listed] == ["33", "34", "35"]
    assert "is longer than 32" in listed[0]["why"] and "no image" in listed[1]["why"]
    settings["data"]["long_text"] = "cut"
    source = source_of(settings, {})
    assert "long" in {r["id"] for r in source.records} and source.rejected.count() == 2
    (world / "mixed.jsonl").unlink()


def test_a_batch_needs_two_distinct_items(settings):
    with pytest.raises(UserError, match="fewer than two distinct items"):
        source_of(settings, {"batch_size": 1}, objectives=["contrasts"]).batch(0)
    assert len(source_of(settings, {"batch_size": 1}).batch(0)["ids"]) == 1


def test_replacement_in_a_batch_depends_on_its_arguments_alone():
    met = []

    def read(item, seed):
        if item % 3 == 0:
            raise UserError("broken", item)
        return item, seed

    live = LiveItems(read, range(12), lambda item, e: met.append(item), workers=2)
    chosen, items = live.load([0, 1, 2, 3], [7, 8, 9, 10], np.random.default_rng(0))
    assert chosen[1:3] == [1, 2] and [i for i, _ in items] == chosen and [s for _, s in items] == [7, 8, 9, 10]
    assert all(i % 3 for i in chosen) and len(set(chosen)) == 4 and set(met) >= {0, 3}
    fresh = LiveItems(read, range(12), lambda item, e: None)
    for _ in range(2):  # what is known to be unreadable changes nothing
        assert fresh.load([0, 1, 2, 3], [7, 8, 9, 10], np.random.default_rng(0)) == (chosen, items)
    with pytest.raises(UserError, match="no readable item is left"):
        LiveItems(read, [0, 3], lambda item, e: None).load([0, 3], [1, 1], np.random.default_rng(0))


# ---- formats ----


def test_the_same_batches_from_jsonl_table_shard_and_parquet(settings, world, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = [json.loads(line) for line in (world / "things_train.jsonl").read_text().splitlines()]
    with (tmp_path / "t.csv").open("w", newline="") as f:
        out = csv.writer(f)
        out.writerow(["file", "name", "one", "two"])
        out.writerows([world / r["image"], r["label"], *r["text"]] for r in rows)
    with tarfile.open(tmp_path / "t-0.tar", "w") as tar:
        for i, r in enumerate(rows):
            tar.add(world / r["image"], f"{i:04d}.png")
            shutil.copy(world / r["image"], tmp_path / "copy.png")
            (tmp_path / "meta.json").write_text(json.dumps({"text": r["text"], "label": r["label"]}))
            tar.add(tmp_path / "meta.json", f"{i:04d}.json")
    pictures = [{"bytes": (world / r["image"]).read_bytes(), "path": None} for r in rows]
    table = {"image": pictures, "text": [r["text"] for r in rows], "label": [r["label"] for r in rows]}
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "t.parquet")
    columns = {"image": "file", "label": "name", "text": ["one", "two"]}
    expected = source_of(settings, {}).batch(3)
    for data in ({"path": str(tmp_path / "t.csv"), "columns": columns}, str(tmp_path / "t-{0..0}.tar"),
                 {"path": str(tmp_path / "t.parquet"), "streaming": True}, str(tmp_path / "t.parquet")):  # fmt: skip
        got = source_of(settings, {"data": data}).batch(3)
        assert got["labels"] == expected["labels"] and same(got["streams"], expected["streams"]), data
    frozen = source_of(settings, {}, trains=set()).batch(3)["streams"]
    for data in (str(tmp_path / "t-0.tar"), {"path": str(tmp_path / "t.parquet"), "streaming": True}):
        assert same(source_of(settings, {"data": data}, trains=set()).batch(3)["streams"], frozen), data


def test_large_jpegs_are_decoded_small_for_a_small_tower(settings, world, tmp_path, monkeypatch):
    rows = [json.loads(line) for line in (world / "things_train.jsonl").read_text().splitlines()]
    for row in rows:
        Image.open(world / row["image"]).convert("RGB").resize((512, 512)).save(tmp_path / f"{row['id']}.jpg")
        row["image"] = str(tmp_path / f"{row['id']}.jpg")
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    source = {"data": str(tmp_path / "t.jsonl"), "augment": "none"}
    small = source_of(settings, source).batch(0)["streams"]["image"]["pixel_values"]
    monkeypatch.setattr(Image.Image, "draft", lambda *_: None)
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", lambda *_: None)
    whole = source_of(settings, source).batch(0)["streams"]["image"]["pixel_values"]
    assert 0 < (small - whole).abs().mean() < 0.02


# ---- samplers, captions, transforms ----


def test_samplers_by_config(settings):
    groups = {"type": "k_per_group", "by": "meta.subgroup", "options": {"k": 4}}
    batch = source_of(settings, {"sampler": groups}).batch(0)
    assert sorted(x.split()[1] for x in batch["labels"]) == ["bar"] * 4 + ["square"] * 4
    one = source_of(settings, {"sampler": {"type": "one_cluster", "by": "meta.subgroup"}})
    assert all(len({x.split()[1] for x in one.batch(s)["labels"]}) == 1 for s in range(6))
    for sampler, words in (
        ("distnct", "did you mean 'distinct'"),
        ({"type": "k_per_group", "options": {"kk": 2}}, "did you mean 'k'"),
        ({"type": "k_per_group", "options": {"k": 3}}, "no multiple of k = 3"),
        ({"type": "balanced", "by": "meta.none"}, "no meta.none"),
        ({"type": "balanced", "by": "grup"}, "unknown sampler key"),
    ):
        with pytest.raises(UserError, match=words):
            source_of(settings, {"sampler": sampler})


def test_two_processes_share_a_batch(settings):
    source = source_of(settings, {"sampler": "shuffle", "batch_size": 4})
    whole = source_of(settings, {"sampler": "shuffle", "batch_size": 8}).batch(2)["ids"]
    assert sorted(source.batch(2, 0, 2)["ids"] + source.batch(2, 1, 2)["ids"]) == sorted(whole)


def test_choices_of_captions(settings, world, tmp_path):
    rows = [json.loads(line) for line in (world / "things_train.jsonl").read_text().splitlines()]
    for row in rows:
        row["image"] = str(world / row["image"])
        row["text"] = {"en": row["text"], "xx": "picture of a a a a"}
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    base = {"data": str(tmp_path / "t.jsonl"), "sampler": "shuffle"}
    both = {"image", "text"}
    batch = source_of(settings, {**base, "captions": "all"}, trains=both).batch(0)
    assert len(batch["ids"]) == 8 and batch["languages"] == ["en", "en", "xx"] * 8
    # A picture is read once, however many texts it has.
    assert len(batch["streams"]["image"]["pixel_values"]) == 8 and batch["owners"]["image"].tolist() == list(range(8))
    assert batch["owners"]["text"].tolist() == [i // 3 for i in range(24)]
    assert batch["streams"]["text"]["attention_mask"].sum(1).tolist()[:3] == [2, 5, 6]
    frozen = source_of(settings, {**base, "captions": "all"}, trains=set()).batch(0)
    assert [len(s["pooled"]) for s in frozen["streams"].values()] == [8, 24]
    only = source_of(settings, {**base, "captions": "all", "languages": ["en"]}, trains=both).batch(0)
    assert set(only["languages"]) == {"en"} and len(only["owners"]["text"]) == 16
    first = source_of(settings, {**base, "captions": "first"}, trains=both).batch(0)
    # A batch of two-word texts is two tokens wide.
    assert first["streams"]["text"]["input_ids"].shape == (8, 2)
    turn = source_of(settings, {**base, "captions": "round_robin"}, trains=both)
    used = {}
    for step in range(12):  # three passes over 32 items
        b = turn.batch(step)
        for i, n in zip(b["ids"], b["streams"]["text"]["attention_mask"].sum(1).tolist(), strict=True):
            used.setdefault(i, set()).add(n)
    assert all(lengths == {2, 5, 6} for lengths in used.values()) and len(used) == 32
    with pytest.raises(UserError, match="no text in de"):
        source_of(settings, {**base, "languages": ["de"]})


def test_a_run_with_all_captions_trains(settings, tmp_path):
    settings["phases"] = {"both": settings["phases"]["both"]}
    settings["phases"]["both"]["sources"]["things"] |= {"captions": "all", "sampler": "shuffle"}
    settings["phases"]["both"]["train"] = {"max_steps": 20, "logging_steps": 10}
    settings["measures"] = {}
    out = align(parse_config(settings, AlignConfig), tmp_path / "run")
    first, last = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    assert last["loss"] < first["loss"]


def test_transforms_reach_pictures_boxes_and_texts(settings, world):
    crop = {"type": "random_resized_crop", "scale": [0.3, 0.5], "keep": 0.0}
    settings["phases"]["both"]["sources"]["things"] |= {"data": "scenes_train.jsonl", "augment": "none"}
    settings["phases"]["both"]["sources"]["things"] |= {"streams": ["image"], "sampler": "random"}
    plain, cropped = source_of(settings, {}), source_of(settings, {"transforms": [crop]})
    one, two = plain.batch(0), cropped.batch(0)
    assert one["ids"] == two["ids"] and one["boxes"] != two["boxes"]
    assert not torch.equal(one["streams"]["image"]["pixel_values"], two["streams"]["image"]["pixel_values"])
    assert same(two, source_of(settings, {"transforms": [crop]}).batch(0))
    with pytest.raises(UserError, match="'wave_gain' changes what no tower that trains here reads"):
        source_of(settings, {"transforms": ["wave_gain"]})
    with pytest.raises(UserError, match="'horizontal_flip' changes .* copies: K"):
        source_of(settings, {"transforms": ["horizontal_flip"]}, trains=set())
    with pytest.raises(UserError, match="exclude each other"):
        source_of(settings, {"transforms": ["horizontal_flip"], "augment": "cutout"})
    sounds = source_of(settings, {"transforms": [{"type": "wave_crop", "samples": 2000}]}, "sounds")
    heard = sounds.batch(0)["streams"]["audio"]["feature_attention_mask"].sum(1)
    assert (
        heard.max()
        < source_of(settings, {"transforms": []}, "sounds")
        .batch(0)["streams"]["audio"]["feature_attention_mask"]
        .sum(1)
        .min()
    )
    words = {"streams": ["text"], "data": "things_train.jsonl", "transforms": [{"type": "word_dropout", "p": 0.9}]}
    mask = source_of(settings, words, trains={"text"}).batch(0)["streams"]["text"]["attention_mask"]
    assert mask.sum(1).min() == 1


# ---- data check of a config ----


def test_data_check_of_a_config(settings, broken, tmp_path):
    import yaml
    from click.testing import CliRunner

    from mmllm.cli.data import command

    sources = settings["phases"]["both"]["sources"]
    sources["things"]["data"], sources["sounds"]["data"] = str(broken / "things.jsonl"), str(broken / "sounds.jsonl")
    settings["phases"]["words"]["sources"]["sounds"]["data"] = str(broken / "sounds.jsonl")
    with (broken / "things.jsonl").open("a") as f:
        f.write(json.dumps({"id": "long", "image": "bad.png", "text": "red " * 40}) + "\n")
        f.write(json.dumps({"id": "none", "text": "red"}) + "\n")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    records, problems = check_config(tmp_path / "c.yaml")
    where = [p.split(": ")[0].rsplit("/", 1)[1] for p in problems]
    assert where == ["things.jsonl:4", "things.jsonl:33", "things.jsonl:33", "things.jsonl:34", "sounds.jsonl:4"]
    # The scenes are read for their pictures alone, the sounds of both phases once; and the measures' 3 x 16 items.
    assert records == 34 + 32 + 32 + 48
    told = CliRunner().invoke(command, ["check", str(tmp_path / "c.yaml"), "data.long_text=cut"])
    assert told.exit_code == 2 and f"{records} records, 4 problems" in told.output


def test_data_check_asks_of_a_record_what_its_source_does(settings, world, tmp_path):
    import yaml

    things = settings["phases"]["both"]["sources"]["things"]
    settings["phases"]["both"]["sources"] = {"things": things}
    settings["phases"]["both"]["objectives"] = settings["phases"]["both"]["objectives"][:1]
    settings |= {"phases": {"both": settings["phases"]["both"]}, "measures": {}}
    both = {"data": ["things_train.jsonl", "sounds_train.jsonl"], "streams": ["image", "audio", "text"]}

    def problems(**more):
        settings["phases"]["both"]["sources"]["things"] = things | both | more
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        return check_config(tmp_path / "c.yaml")[1]

    assert len(problems()) == 64 and len(problems(optional=["audio"])) == 32
    assert problems(optional=["image", "audio"]) == []
    joined = {"type": "join_by_label", "field": "image", "add": ["audio"]}
    assert problems(recipes=[joined]) == []


def test_rejected_needs_no_file():
    rejected = Rejected()
    rejected.expect("x", 1000)
    rejected.add("x", "a", "here", "bad")
    rejected.check("x")
    assert rejected.count() == 1


def test_no_picture_is_decoded_smaller_than_its_processor_resizes_to():
    from transformers import CLIPImageProcessor, Siglip2ImageProcessor

    from mmllm.align.reading import resized_to
    from mmllm.towers import MMLLMImageProcessor

    assert resized_to(MMLLMImageProcessor(image_size=64), 64) == 64
    clip = CLIPImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224})
    assert resized_to(clip, 224) == 256
    assert resized_to(Siglip2ImageProcessor(), 224) is None


def test_live_pictures_leave_their_thread_at_the_size_of_the_tower(settings, world):
    source = source_of(settings, {"sampler": "shuffle", "augment": "none"})
    item = source.media.read(0, None)
    processor = source.media.processor("image")
    assert item["image"].shape == (3, processor.image_size, processor.image_size)
    expected = image_inputs(processor, [load_image(source.records[0]["image"])])
    made = source.collate([0], None)["streams"]["image"]["pixel_values"]
    assert torch.equal(made, expected["pixel_values"])
