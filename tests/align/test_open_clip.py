"""open_clip checkpoints against an independent reference of their layout, and against open_clip where it is there."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tower_families import tokenizer

from mmllm.align import load_align, save_align
from mmllm.align.open_clip import import_open_clip
from mmllm.errors import UserError

VISION = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
TEXT = {"context_length": 16, "vocab_size": 40, "width": 24, "heads": 2, "layers": 2}
TANH = {"approximate": "tanh"}
CONFIG = {"embed_dim": 20, "vision_cfg": VISION, "text_cfg": TEXT}


def blocks(prefix, width, layers):
    shapes = {"ln_1.weight": (width,), "ln_1.bias": (width,), "ln_2.weight": (width,), "ln_2.bias": (width,),
              "attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,),
              "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,),
              "mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,),
              "mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,)}  # fmt: skip
    return {f"{prefix}transformer.resblocks.{i}.{k}": s for i in range(layers) for k, s in shapes.items()}


def random_state(text_prefix=""):
    """A state dict in open_clip's layout."""
    v, t = VISION["width"], TEXT["width"]
    shapes = {
        "visual.class_embedding": (v,), "visual.positional_embedding": (17, v), "visual.proj": (v, 20),
        "visual.conv1.weight": (v, 3, 8, 8), "visual.ln_pre.weight": (v,), "visual.ln_pre.bias": (v,),
        "visual.ln_post.weight": (v,), "visual.ln_post.bias": (v,), **blocks("visual.", v, 2),
        f"{text_prefix}positional_embedding": (16, t), f"{text_prefix}token_embedding.weight": (40, t),
        f"{text_prefix}text_projection": (t, 20), f"{text_prefix}ln_final.weight": (t,),
        f"{text_prefix}ln_final.bias": (t,), **blocks(text_prefix, t, 2),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    state = {k: 0.3 * torch.randn(s, generator=generator) for k, s in shapes.items()}
    return state | {"logit_scale": torch.tensor(4.7)}


def attention(x, w, prefix, heads, causal):
    q, k, v = F.linear(x, w[f"{prefix}in_proj_weight"], w[f"{prefix}in_proj_bias"]).chunk(3, -1)
    split = lambda y: y.unflatten(-1, (heads, -1)).transpose(1, 2)  # noqa: E731
    scores = split(q) @ split(k).transpose(-1, -2) / (q.shape[-1] // heads) ** 0.5
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
    out = (scores.softmax(-1) @ split(v)).transpose(1, 2).flatten(-2)
    return F.linear(out, w[f"{prefix}out_proj.weight"], w[f"{prefix}out_proj.bias"])


def transformer(x, w, prefix, heads, causal, act):
    norm = lambda y, n: F.layer_norm(y, y.shape[-1:], w[f"{n}.weight"], w[f"{n}.bias"])  # noqa: E731
    for i in range(2):
        p = f"{prefix}transformer.resblocks.{i}."
        x = x + attention(norm(x, p + "ln_1"), w, p + "attn.", heads, causal)
        h = act(F.linear(norm(x, p + "ln_2"), w[p + "mlp.c_fc.weight"], w[p + "mlp.c_fc.bias"]))
        x = x + F.linear(h, w[p + "mlp.c_proj.weight"], w[p + "mlp.c_proj.bias"])
    return x


def reference(state, pixels, ids, quick, prefix=""):
    """The two embeddings by the formulas of CLIP (arXiv 2103.00020) on open_clip's names."""
    act = (lambda x: x * torch.sigmoid(1.702 * x)) if quick else F.gelu
    norm = lambda y, n: F.layer_norm(y, y.shape[-1:], state[f"{n}.weight"], state[f"{n}.bias"])  # noqa: E731
    x = F.conv2d(pixels, state["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + state["visual.positional_embedding"]
    x = transformer(norm(x, "visual.ln_pre"), state, "visual.", 2, False, act)
    image = norm(x[:, 0], "visual.ln_post") @ state["visual.proj"]
    y = state[f"{prefix}token_embedding.weight"][ids] + state[f"{prefix}positional_embedding"][: ids.shape[1]]
    y = norm(transformer(y, state, prefix, 2, True, act), f"{prefix}ln_final")
    text = y[torch.arange(len(y)), ids.argmax(-1)] @ state[f"{prefix}text_projection"]
    return F.normalize(image, dim=-1), F.normalize(text, dim=-1)


def some_inputs():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 38, (2, 9), generator=generator)
    ids[0, 8] = ids[1, 5] = 39  # the end of text has the highest id
    ids[1, 6:] = 0
    return torch.randn(2, 3, 32, 32, generator=generator), ids


def embeddings(model, pixels, ids, mask=None):
    with torch.no_grad():
        image = model.stream("image", {"pixel_values": pixels}).embedding
        return image, model.stream("text", {"input_ids": ids, "attention_mask": mask}).embedding


@pytest.mark.parametrize("prefix", ["", "text.", "module."])
@pytest.mark.parametrize("quick", [False, True])
def test_embeddings_are_those_of_the_layout(prefix, quick, tmp_path):
    text_prefix = prefix if prefix == "text." else ""
    state = random_state(text_prefix)
    saved = {f"module.{k}": v for k, v in state.items()} if prefix == "module." else state
    save_file(saved, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "quick_gelu": quick}))
    model = import_open_clip(tmp_path / "model.safetensors", tmp_path / "config.json")
    pixels, ids = some_inputs()
    for mask in (None, (torch.arange(9)[None] < torch.tensor([[9], [6]])).long()):
        expected = reference(state, pixels, ids, quick, text_prefix)
        for mine, theirs in zip(embeddings(model, pixels, ids, mask), expected):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    assert torch.equal(model.logit_scale["image:text"], state["logit_scale"])
    torch.testing.assert_close(model.scale("image:text"), torch.tensor(4.7).exp())


def test_a_hub_folder_with_its_preprocessing_and_bias(tmp_path):
    state = random_state() | {"logit_bias": torch.tensor([-9.5]), "logit_scale": torch.tensor([2.0])}
    save_file(state, tmp_path / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {**CONFIG, "init_logit_bias": -10}, "preprocess_cfg": preprocess})
    )
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    model = import_open_clip(tmp_path, tokenizer=str(tmp_path / "tokenizer"))
    assert float(model.logit_bias["image:text"]) == -9.5
    inputs = model.inputs("image", [Image.new("RGB", (50, 40), (255, 0, 51))])["pixel_values"]
    expected = torch.tensor([2.0, -2.0, (0.2 - 0.5) / 0.25])[None, :, None, None].expand(1, 3, 32, 32)
    torch.testing.assert_close(inputs, expected, atol=1e-4, rtol=0)
    save_align(model, tmp_path / "saved", {})
    again = load_align(tmp_path / "saved")
    torch.testing.assert_close(again.embed("text", ["a red bird"]), model.embed("text", ["a red bird"]))


def test_texts_need_a_tokenizer(tmp_path):
    save_file(random_state(), tmp_path / "m.safetensors")
    model = import_open_clip(tmp_path / "m.safetensors", CONFIG)
    with pytest.raises(UserError, match="text tower has no preprocessor"):
        model.embed("text", ["a bird"])
    save_align(model, tmp_path / "saved", {})
    with pytest.raises(UserError, match="tokenizer"):
        load_align(tmp_path / "saved").embed("text", ["a bird"])


def change(where, **more):
    return {**CONFIG, where: {**CONFIG[where], **more}}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (change("vision_cfg", timm_model_name="vit_base"), "no 'timm_model_name: vit_base'"),
        (change("vision_cfg", layers=[3, 4, 6, 3]), "no ViT"),
        (change("vision_cfg", pool_type="avg"), "'pool_type: avg'"),
        (change("vision_cfg", no_ln_pre=True), "no_ln_pre"),
        (change("text_cfg", hf_model_name="roberta-base"), "hf_model_name"),
        (change("text_cfg", no_causal_mask=True), "no_causal_mask"),
        (change("text_cfg", pool_type="eos"), "cannot pool by 'eos'"),
        (change("vision_cfg", width=64), "is \\[32"),
        (change("text_cfg", layers=3), "no counterpart"),
        ({**CONFIG, "embed_dim": 24}, "no image projection to 24"),
        ({**CONFIG, "multimodal_cfg": {}}, "CoCa"),
    ],
)
def test_other_architectures_are_refused_in_one_line(config, words, tmp_path):
    save_file(random_state(), tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=words) as caught:
        import_open_clip(tmp_path / "m.safetensors", config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_checkpoints_are_refused_whatever_their_name(zipped, tmp_path):
    for name in ("model.pt", "model.safetensors"):
        torch.save(random_state(), tmp_path / name, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match="pickled.*safetensors") as caught:
            import_open_clip(tmp_path / name, CONFIG)
        assert "\n" not in str(caught.value)


def test_files_that_are_not_there_or_something_else(tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        import_open_clip(tmp_path)
    save_file(random_state(), tmp_path / "open_clip_model.safetensors")
    with pytest.raises(UserError, match="no model config"):
        import_open_clip(tmp_path)
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(UserError, match="no open_clip model config"):
        import_open_clip(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"hello")
    with pytest.raises(UserError, match="not a safetensors file"):
        import_open_clip(tmp_path / "x.safetensors", CONFIG)


@pytest.mark.peers
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"quick_gelu": True},
        {"custom_text": True, "init_logit_bias": -10.0},
        {"custom_text": True, "text_cfg": {**TEXT, "proj_bias": True, "mlp_ratio": 2.0, "act_kwargs": TANH}},
        {"vision_cfg": {**VISION, "norm_kwargs": {"eps": 1e-6}}, "text_cfg": {**TEXT, "norm_kwargs": {"eps": 1e-6}}},
        {"custom_text": True, "text_cfg": {**TEXT, "pool_type": "eos", "eos_id": 39}},
    ],
    ids=["plain", "quick_gelu", "custom_text", "bias_and_tanh", "eps", "eos"],
)
def test_embeddings_are_open_clips(more, tmp_path):
    import open_clip

    torch.manual_seed(0)
    config = {**CONFIG, **more}
    kind = open_clip.model.CustomTextCLIP if config.pop("custom_text", False) else open_clip.model.CLIP
    theirs = kind(**config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, tmp_path / "m.safetensors")
    model = import_open_clip(tmp_path / "m.safetensors", config)
    pixels, ids = some_inputs()
    padded = F.pad(ids, (0, 16 - ids.shape[1]))
    with torch.no_grad():
        expected = theirs.encode_image(pixels, normalize=True), theirs.encode_text(padded, normalize=True)
    for mine, wanted in zip(embeddings(model, pixels, ids), expected):
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=0)
    assert torch.equal(model.logit_scale["image:text"], theirs.logit_scale)
    if theirs.logit_bias is not None:
        assert torch.equal(model.logit_bias["image:text"], theirs.logit_bias)


@pytest.mark.peers
def test_pictures_are_prepared_as_open_clip_does(tmp_path):
    import numpy as np
    import open_clip

    save_file(random_state(), tmp_path / "m.safetensors")
    model = import_open_clip(tmp_path / "m.safetensors", CONFIG)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 45, 3), dtype=np.uint8))
    theirs = open_clip.image_transform(32, is_train=False)(picture)
    mine = model.inputs("image", [picture])["pixel_values"][0]
    torch.testing.assert_close(mine, theirs, atol=0.02, rtol=0)
