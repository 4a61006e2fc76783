"""CLIP, SigLIP, SigLIP 2 and CLAP in and out: embeddings, scales and biases equal, round trips bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from tower_families import FAMILIES, clap, clip, items, seeded, siglip, siglip2

from mmllm.align import load_align, save_align
from mmllm.align.config import HeadConfig
from mmllm.align.interop import export_align, import_align
from mmllm.align.model import AlignModel, ProjectionHead
from mmllm.errors import UserError
from mmllm.towers import apply_train

SOURCES = {"clip": clip, "siglip": siglip, "siglip2": siglip2, "clap": clap}


@pytest.fixture(params=SOURCES)
def source(request, tmp_path):
    """Name, folder with preprocessors of both towers, and the model loaded by transformers alone."""
    folder = tmp_path / "source"
    media, text = FAMILIES[request.param], FAMILIES[f"{request.param}_text"]
    media.write(folder)
    text.write(folder)
    model = seeded(SOURCES[request.param])
    with torch.no_grad():  # off their starting values, SigLIP's above the usual limit of 100
        for name, p in model.named_parameters():
            if name.startswith("logit"):
                p.fill_({"logit_bias": -3.3, "logit_scale_t": 1.7}.get(name, 4.8))
    model.save_pretrained(folder)
    return request.param, folder, model.eval()


def media_stream(name):
    return "audio" if name == "clap" else "image"


def test_embeddings_scales_and_biases_are_the_sources(source):
    name, folder, theirs = source
    mine, stream = import_align(str(folder)), media_stream(name)
    things, texts = items("audio" if name == "clap" else "vision"), items("text")
    media, words = mine.inputs(stream, things), mine.inputs("text", texts)
    with torch.no_grad():
        if name == "clap":
            a = theirs.get_audio_features(media["input_features"], is_longer=media["is_longer"])
        else:
            a = theirs.get_image_features(**media)
        # SigLIP was trained to look at its padding.
        b = theirs.get_text_features(words["input_ids"], None if "siglip" in name else words["attention_mask"])
    a, b = (torch.nn.functional.normalize(x.pooler_output, dim=-1) for x in (a, b))
    torch.testing.assert_close(mine.embed(stream, things), a, atol=1e-5, rtol=0)
    torch.testing.assert_close(mine.embed("text", texts), b, atol=1e-5, rtol=0)
    scale = theirs.logit_scale_a if name == "clap" else theirs.logit_scale
    assert torch.equal(mine.scale(f"{stream}:text").reshape(()), scale.exp().reshape(()))
    if name == "clap":
        assert torch.equal(mine.scale("text:audio"), theirs.logit_scale_t.exp())
    bias = theirs.logit_bias if "siglip" in name else torch.zeros(1)
    assert torch.equal(mine.logit_bias[f"{stream}:text"], bias.reshape(()))


def test_round_trip_is_equal_bit_for_bit(source, tmp_path):
    _, folder, _ = source
    export_align(import_align(str(folder)), tmp_path / "out")
    one, two = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    assert set(one) == set(two) and all(torch.equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in one)
    configs = [json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "out")]
    parts = [[{a: b for a, b in c[k].items() if a not in LOADED} for k in sorted(c) if "_config" in k] for c in configs]
    assert parts[0] == parts[1] and len(parts[0]) == 2 and configs[0]["architectures"] == configs[1]["architectures"]


# What transformers writes down about how a part was loaded.
LOADED = ("architectures", "dtype", "transformers_version", "_attn_implementation_autoset")


def test_round_trip_in_half_precision(tmp_path):
    seeded(clip).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    export_align(import_align(str(tmp_path / "source")), tmp_path / "out", dtype=torch.bfloat16)
    one, two = (load_file(tmp_path / f / "model.safetensors") for f in ("source", "out"))
    assert all(torch.equal(one[k], two[k]) and two[k].dtype == torch.bfloat16 for k in one)


@pytest.mark.parametrize("source", [n for n in SOURCES if n != "clap"], indirect=True)
def test_an_exported_folder_works_with_transformers_own_processor(source, tmp_path):
    name, folder, _ = source
    model, stream = import_align(str(folder)), media_stream(name)
    export_align(model, tmp_path / "out")
    again = tf.AutoModel.from_pretrained(tmp_path / "out").eval()
    processor = tf.AutoImageProcessor.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        found = again.get_image_features(**processor(images=items("vision"), return_tensors="pt")).pooler_output
    expected = model.embed(stream, items("vision"))
    torch.testing.assert_close(torch.nn.functional.normalize(found, dim=-1), expected, atol=1e-5, rtol=0)


def test_imported_models_are_saved_and_loaded_as_any_aligned_model(source, tmp_path):
    name, folder, _ = source
    model, stream = import_align(str(folder)), media_stream(name)
    save_align(model, tmp_path, {})
    again = load_align(tmp_path)
    for s, things in ((stream, items("audio" if name == "clap" else "vision")), ("text", items("text"))):
        torch.testing.assert_close(again.embed(s, things), model.embed(s, things), atol=1e-6, rtol=0)
    for pair in model.logit_scale:
        assert torch.equal(again.scale(pair), model.scale(pair))
        assert torch.equal(again.logit_bias[pair], model.logit_bias[pair])


def test_adapters_are_merged_on_export(tmp_path):
    FAMILIES["clip"].write(tmp_path / "source")
    FAMILIES["clip_text"].write(tmp_path / "source")
    model = import_align(str(tmp_path / "source"))
    for p in apply_train(model.tower("image"), {"lora": {"r": 2}}):
        torch.nn.init.normal_(p, std=0.2)
    export_align(model, tmp_path / "out")
    again = import_align(str(tmp_path / "out"))
    torch.testing.assert_close(again.embed("image", items("vision")), model.embed("image", items("vision")),
                               atol=1e-5, rtol=0)  # fmt: skip


@pytest.fixture
def clip_model(tmp_path):
    FAMILIES["clip"].write(tmp_path / "clip")
    FAMILIES["clip_text"].write(tmp_path / "clip")
    return import_align(str(tmp_path / "clip"))


def test_new_heads_of_the_right_shape_can_be_exported(clip_model, tmp_path):
    clip_model.heads["image"] = ProjectionHead(32, 24, HeadConfig(bias=False))
    export_align(clip_model, tmp_path / "out")
    torch.testing.assert_close(
        import_align(str(tmp_path / "out")).embed("image", items("vision")), clip_model.embed("image", items("vision"))
    )


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ({"bias": True}, "one matrix 32 -> 24 without bias; the head of 'image' has layers 32 -> 24 with bias"),
        ({"bias": False, "norm": True}, "layers 32 -> 24 with LayerNorm"),
        ({"bias": False, "hidden_dim": 8}, "layers 32 -> 8 -> 24"),
    ],
)
def test_heads_that_clip_has_not_are_named(clip_model, tmp_path, head, words):
    clip_model.heads["image"] = ProjectionHead(32, 24, HeadConfig(**head))
    with pytest.raises(UserError, match=words) as caught:
        export_align(clip_model, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_what_else_forbids_an_export_is_named(clip_model, folder_of_world, tmp_path):
    clip_model.logit_bias["image:text"].data.fill_(-10)
    with pytest.raises(UserError, match="no logit_bias; pair 'image:text' has -10"):
        export_align(clip_model, tmp_path / "out")
    with pytest.raises(UserError, match="no stream 'words'"):
        export_align(clip_model, tmp_path / "out", text="words")
    bert = folder_of_world["bert"]
    towers = {"image": clip_model.tower("image"), "text": bert, "own": folder_of_world["own"]}
    heads = {n: ProjectionHead(t.pooled_size, 24, HeadConfig(bias=False)) for n, t in towers.items()}
    mixed = AlignModel(towers, {n: n for n in towers}, heads, {}, [("image", "text")], 24)
    with pytest.raises(UserError, match="'mean' pooling"):
        export_align(mixed, tmp_path / "out")
    bert.pooling = "pooler"
    with pytest.raises(UserError, match="joins a 'clip_vision_model' and a 'bert'"):
        export_align(mixed, tmp_path / "out")
    with pytest.raises(UserError, match="'tiny_vit' tower"):
        export_align(mixed, tmp_path / "out", media="own")


@pytest.fixture
def folder_of_world(tmp_path):
    from mmllm.towers import load_tower

    FAMILIES["bert"].write(tmp_path / "bert")
    own = load_tower({"model": "tiny:vit", "image_size": 16, "hidden_size": 32, "layers": 1, "heads": 2}, "vision")
    return {"bert": load_tower(str(tmp_path / "bert"), "text"), "own": own}


def test_siglip_takes_no_projection(tmp_path):
    FAMILIES["siglip"].write(tmp_path / "siglip")
    model = import_align(str(tmp_path / "siglip"))
    model.heads["image"] = ProjectionHead(32, 32, HeadConfig())
    with pytest.raises(UserError, match="SiglipModel has no projection .*'image' has layers 32 -> 32"):
        export_align(model, tmp_path / "out")
    with pytest.raises(UserError, match="32 against 16"):
        ProjectionHead(32, 16, HeadConfig(identity=True))


def test_other_models_and_missing_weights_are_told(tmp_path):
    FAMILIES["bert"].write(tmp_path / "bert")
    with pytest.raises(UserError, match="unknown two-tower model 'bert'"):
        import_align(str(tmp_path / "bert"))
    with pytest.raises(UserError, match="cannot load"):
        import_align(str(tmp_path / "nothing"))
    FAMILIES["clip"].write(tmp_path / "clip")
    from safetensors.torch import save_file

    file = tmp_path / "clip" / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "logit_scale"}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="weights are missing: logit_scale"):
        import_align(str(tmp_path / "clip"))
