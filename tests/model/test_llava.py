"""LLaVA folders in and out: the logits of transformers' own class on the same prompt and picture."""

import pytest
import torch
from tiny_llava_kinds import ask, picture, save_llava
from tiny_mm import tiny_llm, tiny_model, tiny_towers
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmllm.errors import UserError
from mmllm.model import build_model, import_llava, load_model
from mmllm.model.llava import is_llava
from mmllm.serve.export import export_model
from mmllm.serve.export_llava import export_llava
from mmllm.towers import load_tower

KINDS = {
    "clip default": {},
    "clip full": {"strategy": "full", "layer": -1},
    "siglip full": {"tower": "siglip", "strategy": "full", "layer": -1, "llm": "qwen"},
    "siglip default": {"tower": "siglip", "tie": True},  # drops the first patch
    "clip first layer": {"layer": 1, "start": True, "multimodal_projector_bias": False},
}


def theirs(folder):
    """LLaVA's logits and ids by transformers alone."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    text = processor.apply_chat_template(ask(picture()), add_generation_prompt=True)
    inputs = processor(images=picture(), text=text, return_tensors="pt")
    blank = {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}
    with torch.no_grad():
        logits = model(**inputs).logits
        assert (logits - model(**blank).logits).abs().max() > 0.1, "the picture must matter"
    return logits, inputs["input_ids"]


def own(model, processor):
    inputs = processor.apply_chat_template(ask(picture()), tokenize=True, add_generation_prompt=True)
    with torch.no_grad():
        return model(**inputs).logits, inputs["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_llava_folder_gives_the_same_logits_here_and_again_after_export(kind, tmp_path):
    folder = save_llava(tmp_path / "llava", **KINDS[kind])
    assert is_llava(folder)
    wanted, ids = theirs(folder)
    model, processor = import_llava(folder, torch.float32)
    got, own_ids = own(model, processor)
    assert own_ids.tolist() == ids.tolist()
    torch.testing.assert_close(got[..., : wanted.shape[-1]], wanted, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    again, _ = own(*load_model(tmp_path / "ours", torch.float32))
    torch.testing.assert_close(again, got)
    back, back_ids = theirs(export_llava(tmp_path / "ours", tmp_path / "back"))
    assert back_ids.tolist() == ids.tolist()
    torch.testing.assert_close(back[..., : wanted.shape[-1]], wanted, rtol=1e-4, atol=1e-4)


@pytest.fixture
def clip(tmp_path):
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7
    )
    CLIPVisionModel(config).save_pretrained(tmp_path / "clip")
    side = {"height": 28, "width": 28}
    CLIPImageProcessorPil(size=side, crop_size=side).save_pretrained(tmp_path / "clip")
    return load_tower(str(tmp_path / "clip"), "vision")


def saved(folder, **parts):
    model, processor = build_model(tiny_llm(), dtype=torch.float32, **parts)
    with torch.no_grad():
        for weight in model.vision_connector.parameters():
            weight *= 8
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


@pytest.mark.parametrize("chatml", [True, False])
def test_our_own_model_is_a_llava_for_transformers(clip, tmp_path, chatml):
    model, processor = build_model(
        tiny_llm(chatml), vision_tower=clip, connectors={"vision": {"type": "mlp"}}, dtype=torch.float32
    )
    with torch.no_grad():
        for weight in model.vision_connector.parameters():
            weight *= 8
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    wanted, ids = own(model, processor)
    got, own_ids = theirs(export_llava(tmp_path / "ours", tmp_path / "out"))
    assert own_ids.tolist() == ids.tolist()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    low = export_llava(tmp_path / "ours", tmp_path / "low", dtype="bfloat16")
    assert AutoModelForImageTextToText.from_pretrained(low, dtype="auto").dtype == torch.bfloat16
    assert not list(tmp_path.glob("*.part"))


def test_an_llm_in_bfloat16_goes_out_as_it_is(clip, tmp_path):
    parts = {"vision_tower": clip, "connectors": {"vision": {"type": "mlp"}}}
    model, processor = build_model(tiny_llm(), dtype=torch.bfloat16, **parts)
    model.language_model.to(torch.bfloat16)  # the tiny one is handed in, so it has a dtype of its own
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    out = AutoModelForImageTextToText.from_pretrained(export_llava(tmp_path / "ours", tmp_path / "out"), dtype="auto")
    assert {p.dtype for p in out.parameters()} == {torch.bfloat16}
    assert torch.equal(out.lm_head.weight, model.get_output_embeddings().weight)


@pytest.mark.parametrize(
    "connector, word",
    [
        ({"type": "grid_mlp"}, "'grid_mlp'"),
        ({"type": "mlp", "depth": 3}, "depth 3"),
        ({"type": "mlp", "norm": True}, "norm True"),
        ({"type": "linear"}, "'linear'"),
    ],
)
def test_other_connectors_are_refused_in_one_line(clip, tmp_path, connector, word):
    saved(tmp_path / "ours", vision_tower=clip, connectors={"vision": connector})
    with pytest.raises(UserError, match=word) as e:
        export_llava(tmp_path / "ours", tmp_path / "out")
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


def test_other_parts_are_refused_in_one_line(clip, tmp_path):
    mlp = {"vision": {"type": "mlp"}}
    gated = {"type": "gated_cross_attention", "every": 2, "num_heads": 4}
    saved(tmp_path / "inside", vision_tower=clip, connectors=mlp, injector=gated)
    saved(tmp_path / "own tower", vision_tower=tiny_towers()[0], connectors=mlp)
    model, processor = tiny_model()
    model.save_pretrained(tmp_path / "sounds")
    processor.save_pretrained(tmp_path / "sounds")
    for name, word in (("inside", "injector"), ("own tower", "tiny_vit"), ("sounds", "audio tower")):
        with pytest.raises(UserError, match=word) as e:
            export_llava(tmp_path / name, tmp_path / "out")
        assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


def test_what_our_parts_cannot_hold_is_refused(tmp_path):
    save_llava(tmp_path / "two", layer=[-2, -1])
    save_llava(tmp_path / "relu", projector_hidden_act="relu")
    for name, word in (("two", "vision_feature_layer"), ("relu", "projector_hidden_act")):
        with pytest.raises(UserError, match=word):
            import_llava(tmp_path / name, torch.float32)
    with pytest.raises(UserError, match="cannot load a LLaVA"):
        import_llava(tmp_path / "none", torch.float32)


def test_the_command_line_writes_one(clip, tmp_path, capsys):
    from mmllm.cli.main import main

    saved(tmp_path / "ours", vision_tower=clip, connectors={"vision": {"type": "mlp"}})
    for more, code in (([], 0), (["--adapter"], 2)):
        with pytest.raises(SystemExit) as end:
            out = str(tmp_path / f"out{code}")
            main(["export", str(tmp_path / "ours"), "--out", out, "--format", "llava", *more])
        assert end.value.code == code
    last = capsys.readouterr().err.splitlines()[-1]  # before it: the bars of saving
    assert last.startswith("error: ") and "adapter" in last and is_llava(tmp_path / "out0")
    with pytest.raises(UserError, match="llava"):
        export_model(tmp_path / "out0", tmp_path / "again")
