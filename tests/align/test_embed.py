"""`mmllm embed` and `mmllm search` on a tiny align run, through the real commands; and the measures of a run."""

from __future__ import annotations

import json
import tarfile

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

from mmllm.align import load_align
from mmllm.cli.main import cli
from mmllm.config import parse_config
from mmllm.data.media import load_image
from mmllm.data.records import read_records
from mmllm.errors import UserError
from mmllm.evaluate.index import Index
from mmllm.report.figures import read_figures
from mmllm.train.align import AlignConfig, align


@pytest.fixture
def small(settings):
    """The tiny world's first phase, without cut-outs: pictures are seen in training as they are when embedded."""
    settings["phases"] = {"both": settings["phases"]["both"]}
    settings["phases"]["both"]["sources"]["things"]["augment"] = "none"
    settings["measures"] = {}
    settings["streams"]["heard"] = {"modality": "text", "tower_of": "text", "head": {"bias": False}}
    settings["phases"]["both"]["sources"]["sounds"]["streams"] = ["audio", "heard"]
    settings["phases"]["both"]["objectives"][1]["options"] = {"pair": ["audio", "heard"]}
    settings["phases"]["both"]["trains"].append("heard.head")
    return settings


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """One run for all tests below; see ``small``."""
    held = {}

    def make(settings):
        if "run" not in held:
            root = tmp_path_factory.mktemp("trained")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("MMLLM_CACHE", str(root / "cache"))
                held["run"] = align(parse_config(settings, AlignConfig), root / "run")
        return held["run"]

    return make


def call(*args, code=0):
    result = CliRunner().invoke(cli, [str(a) for a in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


@pytest.mark.parametrize("kind", ["safetensors", "parquet"])
def test_records_to_an_index_and_back(small, trained, world, tmp_path, kind):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    run = trained(small)
    told = call("embed", run, world / "things_val.jsonl", "--out", tmp_path / "i", "--format", kind, "--batch-size", 5)
    assert "16 image" in told and "32 text" in told and "left out" not in told
    index, model = Index.load(tmp_path / "i"), load_align(run)
    records = read_records(world / "things_val.jsonl")
    expected = model.embed("image", [load_image(r["image"]) for r in records])
    torch.testing.assert_close(index.vectors["image"], expected, atol=1e-5, rtol=0)
    texts = [t for r in records for t in r["text"]]
    torch.testing.assert_close(index.vectors["text"], model.embed("text", texts), atol=1e-5, rtol=0)
    assert [i["path"] for i in index.items["image"]] == [r["image"] for r in records]
    assert [i["text"] for i in index.items["text"]] == texts and index.items["text"][1]["id"] == records[0]["id"]
    if kind == "safetensors":
        assert torch.equal(load_file(tmp_path / "i" / "embeddings.safetensors")["image"], index.vectors["image"])
    call("embed", run, world / "things_val.jsonl", "--out", tmp_path / "i", "--streams", "image", "--limit", 3)
    assert {k: v.shape for k, v in Index.load(tmp_path / "i").vectors.items()} == {"image": (3, 16)}


def test_search_by_text_picture_and_sound(small, trained, world, tmp_path):
    run = trained(small)
    for kind in ("things", "sounds"):
        call("embed", run, world / f"{kind}_val.jsonl", "--out", tmp_path / kind)
    right = total = 0
    for name in sorted({r["label"] for r in read_records(world / "things_val.jsonl")}):
        out = call("search", name, "--index", tmp_path / "things", "-k", 2, "--json")
        hits = [json.loads(line) for line in out.splitlines()]
        assert [h["stream"] for h in hits] == ["image"] * 2 and hits[0]["score"] >= hits[1]["score"]
        labels = {r["id"]: r["label"] for r in read_records(world / "things_val.jsonl")}
        right, total = right + sum(labels[h["id"]] == name for h in hits), total + 2
    assert right / total > 3 / 8
    records = read_records(world / "things_val.jsonl")
    # A picture finds itself among the pictures, and texts of the stream it was aligned with if nothing is asked for.
    own = call("search", "--image", records[3]["image"], "--index", tmp_path / "things", "-k", 1, "--in", "image")
    score, stream, found, path = own.strip().split("\t")
    assert (float(score), stream, found, path) == (1.0, "image", records[3]["id"], records[3]["image"])
    texts = call("search", "--image", records[3]["image"], "--index", tmp_path / "things", "-k", 2)
    assert [line.split("\t")[1] for line in texts.splitlines()] == ["text", "text"]
    # A text aimed at sounds goes through the stream that was aligned with them.
    wanted = load_align(run).embed("heard", ["red bar"])[0]
    index = Index.load(tmp_path / "sounds")
    best = index.search(wanted, "audio", 1)[0]
    assert call("search", "red bar", "--index", tmp_path / "sounds", "-k", 1).startswith(f"{best.score:.3f}\taudio")
    sound = read_records(world / "sounds_val.jsonl")[0]
    assert call(
        "search", "--audio", sound["audio"], "--index", tmp_path / "sounds", "--in", "audio", "-k", 1
    ).startswith(f"1.000\taudio\t{sound['id']}")


def test_folders_and_shards_with_what_cannot_be_read(small, trained, tmp_path):
    run = trained(small)
    folder = tmp_path / "media"
    (folder / "sub").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "sub" / "a.png")
    (folder / "sub" / "a.txt").write_text("red square")
    (folder / "b.png").write_text("no picture")
    result = CliRunner().invoke(cli, ["embed", str(run), str(folder), "--out", str(tmp_path / "i")])
    assert result.exit_code == 0 and "1 image, 1 text, 1 heard; 1 left out" in result.output, result.output
    assert "b.png: not a picture" in result.stderr
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in ("sub/a.png", "sub/a.txt"):
            tar.add(folder / name, name.removeprefix("sub/"))
    call("embed", run, tmp_path / "s.tar", "--out", tmp_path / "t")
    plain, packed = Index.load(tmp_path / "i"), Index.load(tmp_path / "t")
    assert all(torch.equal(plain.vectors[s], packed.vectors[s]) for s in ("image", "text"))
    assert packed.items["image"] == [{"id": "s/a", "path": f"{tmp_path / 's.tar'}:a.png"}]


def test_mistakes_in_one_line(small, trained, world, tmp_path):
    run = trained(small)
    things = world / "things_val.jsonl"
    for args, words in (
        (("embed", run, things, "--out", tmp_path / "x", "--streams", "imag"), "did you mean 'image'"),
        (("embed", run, things, "--out", tmp_path / "x", "--format", "parqet"), "did you mean 'parquet'"),
        (("embed", run, things, "--out", world), "holds something else"),
        (("embed", run, world / "sounds_val.jsonl", "--streams", "image", "--out", tmp_path / "x"), "nothing to embed"),
        (("embed", tmp_path, things, "--out", tmp_path / "x"), "no aligned model"),
        (("search", "x", "--index", tmp_path), "no index here"),
        (("search", "--index", tmp_path), "give one query"),
        (("search", "x", "--image", "y.png", "--index", tmp_path), "give one query"),
    ):
        with pytest.raises(UserError, match=words):
            call(*args)
    call("embed", run, things, "--out", tmp_path / "i", "--limit", 2)
    with pytest.raises(UserError, match="did you mean 'image'"):
        call("search", "x", "--index", tmp_path / "i", "--in", "imag")
    with pytest.raises(UserError, match="no such picture"):
        call("search", "--image", tmp_path / "none.png", "--index", tmp_path / "i")


def test_measures_of_pairs_geometry_and_probes(small, world, tmp_path, monkeypatch):
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path / "cache"))
    val = {"data": "things_val.jsonl"}
    small["measures"] = {
        "all": {"kind": "pairs", "streams": ["image", "text"], **val},
        "space": {"kind": "geometry", "streams": ["image", "text"], **val},
        "read": {"kind": "probe", "streams": ["image"], "field": "label", "train": "things_train.jsonl", **val},
        "kinds": {"kind": "zero_shot", "streams": ["image", "text"], "templates": ["{}", "a picture of {}"], **val},
    }
    small["phases"]["both"]["train"]["max_steps"] = 40
    out = align(parse_config(small, AlignConfig), tmp_path / "run")
    figures = {f.name: f for f in read_figures(out / "final" / "results.json")}
    assert figures["all_image_to_text_r10"].n == 16 and figures["all_text_to_image_map"].n == 32
    assert figures["all_image_to_text_r1"].chance == pytest.approx(2 / 32)
    assert figures["read_linear"].value > 2 * figures["read_linear"].chance and figures["read_knn"].n == 16
    assert 0 < figures["space_image_text_cka"].value <= 1 and figures["space_image_text_gap"].value > 0
    assert 1 <= figures["space_image_text_effective_rank_image"].value <= 16
    assert 0 <= figures["kinds"].value <= 1 and figures["kinds"].n == 16
    small["measures"]["read"].pop("train")
    with pytest.raises(UserError, match="needs 'train'"):
        parse_config(small, AlignConfig)
