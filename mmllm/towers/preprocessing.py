"""Pictures, videos and sounds to tower inputs, by our own preprocessors or any of transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import ASTFeatureExtractor, AutoFeatureExtractor, AutoImageProcessor, ClapFeatureExtractor

from mmllm.blocks.sound import resample
from mmllm.errors import UserError
from mmllm.towers.audio_features import MMLLMAudioFeatureExtractor
from mmllm.towers.image_processing import RESAMPLE, MMLLMImageProcessor

FILE = "preprocessor_config.json"
# What transformers' image processors give; the last two come from NaFlex (pictures of any shape as rows of patches).
IMAGE_KEYS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
# Kaldi's frames, which AST's extractor counts without saying so in its config.
AST_WINDOW, AST_HOP = 400, 160


def load_preprocessor(folder: str | Path, modality: str) -> Any:
    """The image processor or feature extractor of a folder or hub id, ours or one of transformers.

    Raises:
        UserError: there is none, or it needs a library that is not here.
    """
    file = Path(folder) / FILE
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if "MMLLMImageProcessor" in text:
        return MMLLMImageProcessor.from_pretrained(folder)
    if "MMLLMAudioFeatureExtractor" in text:
        return MMLLMAudioFeatureExtractor.from_pretrained(folder)
    kind = AutoImageProcessor if modality == "vision" else AutoFeatureExtractor
    try:
        return kind.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as e:
        plain = _squashing_processor(json.loads(text)) if text else None
        if plain is not None:
            return plain
        what = f"cannot load its {kind.__name__} ({str(e).strip().splitlines()[0]})"
        raise UserError(what, folder, f"put the model's {FILE} there") from None


def _squashing_processor(config: dict[str, Any]) -> MMLLMImageProcessor | None:
    """Our processor for a config that only squashes and normalises (DINOv3's, which exists for torchvision alone)."""
    size = config.get("size") or {}
    side = size.get("height")
    if config.get("image_processor_type") != "DINOv3ViTImageProcessor" or not side or side != size.get("width"):
        return None
    return MMLLMImageProcessor(image_size=side, image_mean=config["image_mean"], image_std=config["image_std"])


def set_image_size(processor: Any, side: int) -> None:
    """Makes a processor give pictures of ``side`` x ``side`` pixels.

    Raises:
        UserError: it has no such size.
    """
    if isinstance(processor, MMLLMImageProcessor):
        processor.image_size = side
        return
    size = dict(getattr(processor, "size", None) or {})
    if not size or not {"height", "width", "shortest_edge"} >= set(size):
        raise UserError(f"{type(processor).__name__} takes no image_size", do="leave image_size out")
    processor.size = type(processor.size)(**dict.fromkeys(size, side))
    if getattr(processor, "crop_size", None):
        processor.crop_size = type(processor.crop_size)(height=side, width=side)


def timm_processor(config: Any) -> MMLLMImageProcessor:
    """Our processor with a timm config's size, mean and deviation: it keeps the whole picture, so boxes stay true."""
    data = getattr(config, "pretrained_cfg", None) or {}
    size = data.get("input_size") or (3, 224, 224)
    known = data.get("interpolation") in RESAMPLE
    return MMLLMImageProcessor(
        image_size=size[-1],
        image_mean=data.get("mean") or (0.485, 0.456, 0.406),
        image_std=data.get("std") or (0.229, 0.224, 0.225),
        resample=data["interpolation"] if known else "bicubic",
    )


def resized(processor: Any, image: Any) -> Any:
    """A picture as far as a thread can bring it before its batch is made; ``image_inputs`` gives the same for both.

    Our own processors resize it to uint8 [3, S, S]; for others it stays as it is.
    """
    return processor.resized(image) if isinstance(processor, MMLLMImageProcessor) else image


def image_inputs(processor: Any, images: Sequence[Any]) -> dict[str, Tensor]:
    """Pictures (PIL) -> {"pixel_values": [B, 3, H, W]}, or the padded patches of a NaFlex processor with their mask."""
    out = processor(images=list(images), return_tensors="pt")
    return {k: out[k] for k in IMAGE_KEYS if k in out}


def video_inputs(processor: Any, videos: Sequence[Sequence[Any]], frames: int = 1) -> dict[str, Tensor]:
    """Videos as lists of frames (PIL) -> ``pixel_values`` [B, T, 3, H, W], zeros after the end, ``frame_mask`` [B, T].

    Args:
        frames: the least T; else that of the longest video.

    Raises:
        ValueError: a video without frames.
    """
    if not all(len(v) for v in videos):
        raise ValueError("a video has no frames")
    flat = image_inputs(processor, [frame for video in videos for frame in video])["pixel_values"]
    longest = max(frames, *(len(v) for v in videos))
    pixels = flat.new_zeros(len(videos), longest, *flat.shape[1:])
    mask = torch.zeros(len(videos), longest, dtype=torch.bool)
    start = 0
    for row, video in enumerate(videos):
        pixels[row, : len(video)], mask[row, : len(video)] = flat[start : start + len(video)], True
        start += len(video)
    return {"pixel_values": pixels, "frame_mask": mask}


def audio_inputs(extractor: Any, waves: Sequence[np.ndarray], sampling_rate: int | None = None) -> dict[str, Tensor]:
    """Waves [T] -> ``input_features`` (whatever the extractor makes), ``feature_attention_mask``, CLAP's ``is_longer``.

    Args:
        sampling_rate: of the waves; None: the extractor's. Others are resampled.

    The extractor's window cuts what is longer (for raw waveforms: the tower's ``max_seconds``).
    """
    rate = extractor.sampling_rate
    waves = [resample(np.asarray(w, np.float32), sampling_rate or rate, rate) for w in waves]
    if isinstance(extractor, ClapFeatureExtractor):
        return _clap_inputs(extractor, waves)
    seconds = getattr(extractor, "max_seconds", None)
    if seconds and not isinstance(extractor, MMLLMAudioFeatureExtractor):
        waves = [w[: round(seconds * rate)] for w in waves]
    extra: dict[str, Any] = {}
    if not isinstance(extractor, (MMLLMAudioFeatureExtractor, ASTFeatureExtractor)):
        fixed = hasattr(extractor, "chunk_length")  # Whisper's window
        extra = {"return_attention_mask": True, "padding": "max_length" if fixed else True}
    out = extractor(waves, sampling_rate=rate, return_tensors="pt", **extra)
    features = out["input_features"] if "input_features" in out else out["input_values"]
    mask = out.get("feature_attention_mask", out.get("attention_mask"))
    if isinstance(extractor, ASTFeatureExtractor):
        frames = torch.tensor([1 + (len(w) - AST_WINDOW) // AST_HOP for w in waves])
        mask = (torch.arange(extractor.max_length)[None] < frames[:, None]).long()
    if mask is None:
        mask = torch.ones(features.shape[0], features.shape[1], dtype=torch.long)
    return {"input_features": features, "feature_attention_mask": mask}


def _clap_inputs(extractor: Any, waves: list[np.ndarray]) -> dict[str, Tensor]:
    """One wave at a time with a fixed seed: the extractor's random crops must depend on nothing but the wave.

    Without fusion a long sound gives its first window. Short sounds are repeated, so every frame is valid.
    """
    limit, state = extractor.nb_max_samples, np.random.get_state()
    fuses = extractor.truncation == "fusion"
    features = []
    try:
        for wave in waves:
            np.random.seed(0)
            part = wave if fuses else wave[:limit]
            features.append(extractor(part, sampling_rate=extractor.sampling_rate)["input_features"][0])
    finally:
        np.random.set_state(state)
    # As in the extractor, what is too long by less than a frame counts as short.
    longer = [[fuses and len(w) // extractor.hop_length > limit // extractor.hop_length] for w in waves]
    x = torch.from_numpy(np.stack(features)).float()
    return {
        "input_features": x,
        "feature_attention_mask": torch.ones(len(x), x.shape[2], dtype=torch.long),
        "is_longer": torch.tensor(longer),
    }
