"""open_clip checkpoints (its own ViT and text transformer) as aligned models of transformers' CLIP towers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPTextConfig, CLIPVisionConfig

from mmllm.align.config import HeadConfig
from mmllm.align.model import AlignModel, ProjectionHead
from mmllm.errors import UserError
from mmllm.towers.hf_text import HFTextTower
from mmllm.towers.hf_vision import HFVisionTower

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
# Pixel statistics of OpenAI's CLIP, open_clip's default.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Keys of the model config that this import understands; any other must have a value that changes nothing.
VISION_KEYS = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "norm_kwargs", "act_kwargs"}
TEXT_KEYS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "norm_kwargs", "act_kwargs"}
# Tokenizers, training, and settings of towers that other keys switch on.
WITHOUT_EFFECT = {
    "patch_dropout", "output_tokens", "pos_embed_type", "attn_pooler_queries", "attn_pooler_heads", "pad_id", "eos_id",
    "timm_pool", "timm_proj", "timm_drop", "timm_model_pretrained", "hf_tokenizer_name", "tokenizer_mode",
    "tokenizer_kwargs", "hf_proj_type", "hf_pooler_type", "hf_model_pretrained", "proj_bias",
}  # fmt: skip
DEFAULTS = {"pool_type": ("tok", "argmax", "eos"), "proj_type": ("linear",), "block_type": ("default",)}


def import_open_clip(
    checkpoint: str | Path, config: str | Path | dict[str, Any] | None = None, tokenizer: str | None = None
) -> AlignModel:
    """An aligned model with streams ``image`` and ``text`` from an open_clip checkpoint.

    Args:
        checkpoint: a ``.safetensors`` state dict, or a folder with ``open_clip_model.safetensors`` and
            ``open_clip_config.json`` as open_clip pushes it to the hub.
        config: its model config, as a JSON file (open_clip's ``model_configs/NAME.json``) or a dict; None: beside the
            checkpoint.
        tokenizer: folder or hub id of CLIP's tokenizer, which a checkpoint does not hold; None: texts cannot be
            encoded until the text tower is given one.

    Raises:
        UserError: a pickled checkpoint, a tower of another kind than open_clip's own ViT and causal text transformer,
            or weights that do not fit the config.
    """
    file = Path(checkpoint) / WEIGHTS if Path(checkpoint).is_dir() else Path(checkpoint)
    state = {k.removeprefix("module."): v for k, v in read_state(file).items()}
    described = config if isinstance(config, dict) else read_config(Path(config) if config else file.parent / CONFIG)
    cfg = described.get("model_cfg", described)
    if "multimodal_cfg" in cfg:
        raise UserError("this is a CoCa model", file, "only CLIP models of open_clip can be imported")
    act = "quick_gelu" if cfg.get("quick_gelu") else "gelu"
    vision, text = _vision_config(cfg["vision_cfg"], act, file), _text_config(cfg["text_cfg"], act, file)
    towers: dict[str, Any] = {
        "image": HFVisionTower(vision.to_dict(), pooling="pooler"),
        "text": HFTextTower(text.to_dict(), pooling="pooler"),
    }
    texts = {k.removeprefix("text."): v for k, v in state.items() if not k.startswith("visual.")}
    images = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
    _fill(towers["image"].model, {**_blocks(images), **_named(images, VISION_NAMES, file)}, file)
    _fill(towers["text"].model, {**_blocks(texts), **_named(texts, TEXT_NAMES, file)}, file)
    projections = {"image": images.get("proj"), "text": texts.get("text_projection")}
    bias = texts.get("text_projection.bias")
    if projections["text"] is None and "text_projection.weight" in texts:  # proj_bias: a Linear, not a matrix
        projections["text"] = texts["text_projection.weight"].T
    heads = {}
    for name, matrix in projections.items():
        if matrix is None or matrix.shape[1] != cfg["embed_dim"]:
            raise UserError(f"no {name} projection to {cfg['embed_dim']} numbers", file)
        with_bias = name == "text" and bias is not None
        heads[name] = ProjectionHead(matrix.shape[0], cfg["embed_dim"], HeadConfig(bias=with_bias))
        layer: Any = heads[name][-1]
        layer.load_state_dict({"weight": matrix.T.float(), **({"bias": bias.float()} if with_bias else {})})  # type: ignore[union-attr]
    model = AlignModel(towers, {n: n for n in towers}, heads, {}, [("image", "text")], cfg["embed_dim"])
    model.max_logit_scale = None
    with torch.no_grad():
        model.logit_scale["image:text"].copy_(state["logit_scale"].reshape(()))
        if "logit_bias" in state:
            model.logit_bias["image:text"].copy_(state["logit_bias"].reshape(()))
    size = vision.to_dict()["image_size"]
    towers["image"].use_preprocessor(_image_processor(described.get("preprocess_cfg") or {}, size))
    if tokenizer is not None:
        towers["text"].use_preprocessor(AutoTokenizer.from_pretrained(tokenizer))
    return model.eval()


def read_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        UserError: no such file, or a pickled one: unpickling runs whatever code the file holds.
    """
    if not file.is_file():
        raise UserError("no such checkpoint", file, f"give a .safetensors file, or a folder with {WEIGHTS}")
    with open(file, "rb") as opened:
        start = opened.read(4)
    if start[:1] == b"\x80" or start == b"PK\x03\x04":
        do = "convert it where you trust it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW)"
        raise UserError("this checkpoint is pickled, and loading it could run any code", file, do)
    try:
        return load_file(str(file))
    except SafetensorError as e:
        raise UserError(f"not a safetensors file ({str(e).splitlines()[0]})", file) from None


def read_config(file: Path) -> dict[str, Any]:
    """The model config of an open_clip checkpoint.

    Raises:
        UserError: no such file, or no such config.
    """
    if not file.is_file():
        raise UserError("no model config", file, f"give config: open_clip's model_configs/NAME.json, or {CONFIG}")
    found = json.loads(file.read_text(encoding="utf-8"))
    inner = found.get("model_cfg", found)
    if not {"embed_dim", "vision_cfg", "text_cfg"} <= set(inner):
        raise UserError("this is no open_clip model config", file, "it needs embed_dim, vision_cfg and text_cfg")
    return found


def _check(cfg: dict[str, Any], known: set[str], tower: str, file: Path) -> None:
    """Raises UserError for the first setting that makes the tower something else than CLIP's."""
    for key, value in cfg.items():
        if key in known or key in WITHOUT_EFFECT or not value or value in DEFAULTS.get(key, ()):
            continue
        raise UserError(f"CLIP's {tower} tower has no '{key}: {value}'", file, "this architecture cannot be imported")
    for key, allowed in {"norm_kwargs": {"eps"}, "act_kwargs": {"approximate"}}.items():
        if set(cfg.get(key) or {}) - allowed:
            raise UserError(f"CLIP's {tower} tower has no '{key}: {cfg[key]}'", file)


def _common(cfg: dict[str, Any], act: str, width: int) -> dict[str, Any]:
    if (cfg.get("act_kwargs") or {}).get("approximate") == "tanh":
        act = "gelu_pytorch_tanh"
    eps = (cfg.get("norm_kwargs") or {}).get("eps", 1e-5)
    inner = int(width * cfg.get("mlp_ratio", 4.0))
    return {"hidden_size": width, "intermediate_size": inner, "hidden_act": act, "layer_norm_eps": eps}


def _vision_config(cfg: dict[str, Any], act: str, file: Path) -> CLIPVisionConfig:
    _check(cfg, VISION_KEYS, "vision", file)
    layers, width, size = cfg.get("layers", 12), cfg.get("width", 768), cfg.get("image_size", 224)
    if isinstance(layers, list) or cfg.get("pool_type", "tok") != "tok":
        raise UserError("this vision tower is no ViT with a class token", file, "it cannot be imported")
    if not isinstance(size, int):
        if size[0] != size[1]:
            raise UserError(f"CLIP's vision tower takes squares, not {size[0]}x{size[1]}", file)
        size = size[0]
    return CLIPVisionConfig(
        **_common(cfg, act, width),
        num_hidden_layers=layers,
        num_attention_heads=width // cfg.get("head_width", 64),
        image_size=size,
        patch_size=cfg.get("patch_size", 16),
    )


def _text_config(cfg: dict[str, Any], act: str, file: Path) -> CLIPTextConfig:
    _check(cfg, TEXT_KEYS, "text", file)
    pool, eos = cfg.get("pool_type", "argmax"), cfg.get("eos_id", 2)
    if pool not in ("argmax", "eos") or (pool == "eos" and eos == 2):
        raise UserError(f"CLIP's text tower cannot pool by '{pool}'", file, "it cannot be imported")
    return CLIPTextConfig(
        **_common(cfg, act, cfg.get("width", 512)),
        num_hidden_layers=cfg.get("layers", 12),
        num_attention_heads=cfg.get("heads", 8),
        vocab_size=cfg.get("vocab_size", 49408),
        max_position_embeddings=cfg.get("context_length", 77),
        # transformers reads 2 as "the highest id of each text", which is what open_clip does.
        eos_token_id=2 if pool == "argmax" else eos,
    )


VISION_NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
TEXT_NAMES = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
BLOCK_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _named(state: dict[str, Tensor], names: dict[str, str], file: Path) -> dict[str, Tensor]:
    missing = [k for k in names if k not in state]
    if missing:
        raise UserError(f"the checkpoint has no '{missing[0]}'", file, "is this its model config?")
    return {theirs: state[mine] for mine, theirs in names.items()}


def _blocks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformer.resblocks.N.* -> encoder.layers.N.*, with q, k and v taken apart."""
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if not key.startswith("transformer.resblocks."):
            continue
        number, rest = key.removeprefix("transformer.resblocks.").split(".", 1)
        layer = f"encoder.layers.{number}"
        if rest.startswith("attn.in_proj_"):
            for name, part in zip("qkv", value.chunk(3)):
                out[f"{layer}.self_attn.{name}_proj.{rest.removeprefix('attn.in_proj_')}"] = part
            continue
        module, leaf = rest.rsplit(".", 1)
        out[f"{layer}.{BLOCK_NAMES.get(module, module)}.{leaf}"] = value
    return out


def _fill(module: nn.Module, state: dict[str, Tensor], file: Path) -> None:
    own = {k: v for k, v in module.state_dict().items() if not k.endswith("position_ids")}
    loose = sorted(set(own) ^ set(state))
    bent = [k for k in own if k in state and own[k].shape != state[k].shape]
    if loose:
        raise UserError(f"weights do not fit the model config: '{loose[0]}' has no counterpart", file)
    if bent:
        shapes = f"{list(state[bent[0]].shape)} against {list(own[bent[0]].shape)}"
        raise UserError(f"weights do not fit the model config: '{bent[0]}' is {shapes}", file)
    module.load_state_dict({k: v.float().contiguous() for k, v in state.items()}, strict=False)
    module.eval()


def _image_processor(cfg: dict[str, Any], size: int) -> CLIPImageProcessorPil:
    """open_clip's evaluation transform: shortest side (or squash), centre crop, its mean and deviation."""
    mode = cfg.get("resize_mode") or "shortest"
    if mode not in ("shortest", "squash"):
        raise UserError(f"CLIP's image processor cannot resize by '{mode}'", "preprocess_cfg", "shortest or squash")
    square = {"height": size, "width": size}
    return CLIPImageProcessorPil(
        size={"shortest_edge": size} if mode == "shortest" else square,
        do_center_crop=mode == "shortest",
        crop_size=square,
        image_mean=list(cfg.get("mean") or MEAN),
        image_std=list(cfg.get("std") or STD),
        resample=2 if cfg.get("interpolation") == "bilinear" else 3,
    )
