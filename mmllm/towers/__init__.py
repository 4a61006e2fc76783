"""Encoders of pictures, sounds, videos and text behind one contract: transformers' and timm's, and small own ones."""

from mmllm.towers.audio_features import MMLLMAudioFeatureExtractor
from mmllm.towers.factory import build_tower, load_tower, save_tower
from mmllm.towers.image_processing import MMLLMImageProcessor
from mmllm.towers.preprocessing import (
    audio_inputs,
    image_inputs,
    load_preprocessor,
    resized,
    set_image_size,
    video_inputs,
)
from mmllm.towers.training import apply_train

__all__ = [
    "MMLLMAudioFeatureExtractor",
    "MMLLMImageProcessor",
    "apply_train",
    "audio_inputs",
    "build_tower",
    "image_inputs",
    "load_preprocessor",
    "load_tower",
    "resized",
    "save_tower",
    "set_image_size",
    "video_inputs",
]
