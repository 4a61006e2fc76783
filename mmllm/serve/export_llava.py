"""Writes a model of a vision transformer, an MLP and an LLM as a LLaVA folder, which transformers loads by itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from mmllm.errors import UserError
from mmllm.serve.folder import model_folder

DO = "export it without --format llava"
TOLERANCE = 1e-4  # of the largest logit


def export_llava(model: str | Path, out: str | Path, dtype: str | None = None) -> Path:
    """Writes a ``LlavaForConditionalGeneration`` with its ``LlavaProcessor``; logits are compared before that.

    Args:
        model: finished run of pretrain or tune, or a model folder.
        out: new folder; it appears whole or not at all.
        dtype: of the whole model; None takes that of the LLM. LLaVA has one for tower, projector and LLM.

    Raises:
        UserError: something that LLaVA cannot hold: sounds, another connector than an MLP of two layers, an injector,
            a tower that is not one of transformers; or ``out`` exists and is not empty.
    """
    import torch

    from mmllm.model import load_model

    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError("this already exists", target, "give a new folder with --out")
    ours, processor = load_model(model_folder(model), "auto")
    llava, made = as_llava(ours, processor)
    llava = llava.to(getattr(torch, dtype) if dtype else ours.dtype)
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        llava.save_pretrained(part)
        made.save_pretrained(part)
        if target.exists():
            target.rmdir()
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return target


def as_llava(ours: Any, processor: Any) -> tuple[Any, Any]:
    """Our model and processor as LLaVA's; weights are shared with ours.

    Raises:
        UserError: see ``export_llava``.
    """
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    check_parts(ours)
    tower, connector, llm = ours.vision_tower, ours.vision_connector, ours.language_model
    strategy, extra = _strategy(tower)
    text = llm.config.to_dict()
    text["vocab_size"] = llm.get_input_embeddings().weight.shape[0]
    config = LlavaConfig(
        vision_config=tower.config.to_dict(),
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=processor.image_seq_length,
        vision_feature_select_strategy=strategy,  # type: ignore[arg-type]
        vision_feature_layer=tower.layer,
        tie_word_embeddings=bool(llm.config.tie_word_embeddings),
    )
    with torch.device("meta"):
        llava: Any = LlavaForConditionalGeneration(config)
    head = llm.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise UserError("LLaVA's head has no bias", f"LLM '{llm.config.model_type}'", DO)
    llava.model.vision_tower = tower.model
    llava.model.multi_modal_projector.linear_1 = connector.mlp[1]
    llava.model.multi_modal_projector.linear_2 = connector.mlp[3]
    llava.model.language_model = getattr(llm, llm.base_model_prefix)
    llava.lm_head = head
    llava.generation_config = ours.generation_config
    llava.eval()
    _compare(ours, llava, processor)
    return llava, _processor(processor, tower, strategy, extra)


def check_parts(ours: Any) -> None:
    """Whether LLaVA has a place for every part.

    Raises:
        UserError: it has none for one of them.
    """
    from mmllm.towers.hf_vision import HFVisionTower

    if ours.audio_tower is not None:
        raise UserError("LLaVA holds no sounds, and this model has an audio tower", "--format llava", DO)
    if ours.vision_tower is None:
        raise UserError("LLaVA needs a vision tower, and this model has none", "--format llava", DO)
    if ours.injector is not None:
        raise UserError("LLaVA holds no layers inside the LLM, and this model has an injector", "--format llava", DO)
    if ours.tile_rows is not None:
        raise UserError("LLaVA holds whole pictures, and this model cuts them into tiles", "--format llava", DO)
    about = ours.vision_connector.to_config()
    plain = about["type"] == "mlp" and about["depth"] == 2 and not about["norm"]
    if not plain or about["hidden_dim"] != about["out_dim"]:
        what = "LLaVA's connector is an MLP of two layers of the LLM's width"
        raise UserError(f"{what}, this one is {_told(about)}", "--format llava", DO)
    tower = ours.vision_tower
    if not isinstance(tower, HFVisionTower) or tower.naflex or not hasattr(tower.config, "hidden_size"):
        kind = tower.to_config()["model_type"]
        raise UserError(f"LLaVA takes a vision transformer of transformers, not '{kind}'", "--format llava", DO)
    if tower._own_size() not in (None, tower._size()):
        raise UserError("LLaVA gives its tower pictures of the tower's own size alone", "image_size", DO)


def _told(config: dict[str, Any]) -> str:
    if config["type"] != "mlp":
        return f"'{config['type']}'"
    return f"'mlp' with depth {config['depth']}, hidden_dim {config['hidden_dim']}, norm {config['norm']}"


def _strategy(tower: Any) -> tuple[str, int]:
    """LLaVA's name for the tokens that the tower gives, and how many it has beside those of the grid."""
    from mmllm.towers import build_tower

    whole: Any = build_tower({**tower.to_config(), "cut": 0})
    height, width = tower._size()
    down, across = tower._patch()
    total, given = whole.num_tokens(), tower.num_tokens()
    extra = total - (height // down) * (width // across)
    if given == total and not tower.keep_prefix:
        return "full", extra
    if given == total - 1 and not tower.keep_prefix:
        return "default", extra
    raise UserError(f"LLaVA leaves out one token of a tower at most, here {total - given}", "--format llava", DO)


def _compare(ours: Any, llava: Any, processor: Any) -> None:
    """Both models on one picture and some words: whatever LLaVA's layout loses shows in the logits."""
    import torch

    made = torch.Generator().manual_seed(0)
    marks = (processor.image_token_id, processor.audio_token_id)
    words = torch.randint(min(ours.get_input_embeddings().weight.shape[0], min(marks)), (1, 8), generator=made)
    picture = torch.full((1, processor.image_seq_length), processor.image_token_id)
    ids = torch.cat([words[:, :2], picture, words[:, 2:]], dim=1)
    pixels = torch.randn(1, 3, *ours.vision_tower._size(), generator=made)
    with torch.no_grad():
        one = ours(input_ids=ids, pixel_values=pixels).logits.float()
        other = llava(input_ids=ids, pixel_values=pixels).logits.float()
    if one.shape != other.shape or float((one - other).abs().max()) > TOLERANCE * float(one.abs().max()):
        kinds = f"tower '{ours.vision_tower.config.model_type}', LLM '{ours.language_model.config.model_type}'"
        raise UserError(f"LLaVA's layout computes other logits with these parts ({kinds})", "--format llava", DO)


def _processor(processor: Any, tower: Any, strategy: str, extra: int) -> Any:
    from transformers import LlavaProcessor

    patch = tower._patch()
    if patch[0] != patch[1]:
        raise UserError(f"LLaVA's patches are squares, these are {patch}", "--format llava", DO)
    tokenizer = processor.tokenizer
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    if tokenizer("a")["input_ids"] != plain:  # LLaVA's processor adds what the tokenizer adds, ours what is rendered
        for name in ("add_bos_token", "add_eos_token"):
            if hasattr(tokenizer, name):
                setattr(tokenizer, name, False)
        if tokenizer("a")["input_ids"] != plain:
            from tokenizers import processors

            tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    return LlavaProcessor(
        _image_processor(processor.image_processor),
        tokenizer,
        patch_size=patch[0],
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=extra,
        chat_template=processor.chat_template,
    )


def _image_processor(made: Any) -> Any:
    """transformers' own; our plain one becomes CLIP's with the same numbers."""
    from mmllm.towers.image_processing import RESAMPLE, MMLLMImageProcessor

    if not isinstance(made, MMLLMImageProcessor):
        return made
    try:  # needs torchvision where there is no variant for PIL
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as CLIPProcessor
    except ImportError:
        from transformers import CLIPImageProcessor as CLIPProcessor  # type: ignore[assignment]
    side = {"height": made.image_size, "width": made.image_size}
    return CLIPProcessor(
        size=side,
        crop_size=side,
        do_center_crop=False,
        resample=RESAMPLE[made.resample],
        image_mean=made.image_mean,
        image_std=made.image_std,
    )
