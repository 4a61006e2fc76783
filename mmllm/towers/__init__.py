"""Encoders of pictures, sounds and text behind one contract: pretrained ones of transformers and small own ones."""

from mmllm.towers.audio_features import MMLLMAudioFeatureExtractor
from mmllm.towers.factory import audio_inputs, build_tower, image_inputs, load_preprocessor, load_tower, save_tower
from mmllm.towers.image_processing import MMLLMImageProcessor

__all__ = [
    "MMLLMAudioFeatureExtractor",
    "MMLLMImageProcessor",
    "audio_inputs",
    "build_tower",
    "image_inputs",
    "load_preprocessor",
    "load_tower",
    "save_tower",
]
