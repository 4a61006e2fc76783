"""The multimodal LLM as a transformers model; importing this registers it with the Auto classes."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from mmllm.model.config import MMLLMConfig
from mmllm.model.llava import import_llava
from mmllm.model.loading import build_model, load_model
from mmllm.model.modeling import MMLLMForConditionalGeneration
from mmllm.model.processor import MMLLMProcessor

AutoConfig.register("mmllm", MMLLMConfig, exist_ok=True)
AutoModelForImageTextToText.register(MMLLMConfig, MMLLMForConditionalGeneration, exist_ok=True)
AutoProcessor.register(MMLLMConfig, MMLLMProcessor, exist_ok=True)

__all__ = [
    "MMLLMConfig",
    "MMLLMForConditionalGeneration",
    "MMLLMProcessor",
    "build_model",
    "import_llava",
    "load_model",
]
