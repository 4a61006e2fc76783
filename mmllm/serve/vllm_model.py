"""Our model inside vLLM 0.32: the LLM is vLLM's own, towers and connectors are the very modules we train with.

All code that touches vLLM's Python API lives here and in ``vllm_register``, since that API moves between releases.
"""

# vLLM need not be installed where the types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    StageMissingLayer,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.audio import AudioResampler
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)

from mmllm.blocks.sound import resample
from mmllm.connectors import build_connector
from mmllm.model.chat_template import AUDIO_TOKEN, IMAGE_TOKEN
from mmllm.model.config import MMLLMConfig
from mmllm.model.processor import MMLLMProcessor
from mmllm.serve.folder import check_servable
from mmllm.towers import build_tower

PLACEHOLDERS = {"image": IMAGE_TOKEN, "audio": AUDIO_TOKEN}
DEFAULT_SECONDS = 30.0  # length of the sound that memory is reserved for, where the extractor has no fixed window


class OurResampler(AudioResampler):
    """Brings sounds to the model's rate with the same filter as training, in place of vLLM's torchaudio."""

    def resample(self, audio: np.ndarray, *, orig_sr: float) -> np.ndarray:
        """audio [T] or [channels, T] at ``orig_sr`` Hz -> float32 at the model's rate."""
        assert self.target_sr is not None
        if audio.ndim > 1:
            return np.stack([self.resample(channel, orig_sr=orig_sr) for channel in audio])
        return resample(audio, round(orig_sr), round(self.target_sr))


class MMLLMProcessingInfo(BaseProcessingInfo):
    """What vLLM asks about the model before it runs: config, processor, which media it takes."""

    def get_hf_config(self) -> MMLLMConfig:
        return self.ctx.get_hf_config(MMLLMConfig)

    def get_hf_processor(self, **kwargs: object) -> MMLLMProcessor:
        return self.ctx.get_hf_processor(MMLLMProcessor, **kwargs)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        config = self.get_hf_config()
        has = {"image": config.vision_config, "audio": config.audio_config}
        return {name: None for name, tower in has.items() if tower}

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        return {"text_kwargs": set(), "images_kwargs": set(), "audio_kwargs": set()}

    @property
    def sampling_rate(self) -> int:
        return int(getattr(self.get_hf_processor().feature_extractor, "sampling_rate", 16000))

    def get_data_parser(self) -> MultiModalDataParser:
        parser = MultiModalDataParser(
            target_sr=self.sampling_rate,
            target_channels=1,
            audio_resample_method="scipy",
            expected_hidden_size=self._get_expected_hidden_size(),
            allow_missing_mm_embeddings=self.allow_missing_mm_embeddings,
        )
        parser.audio_resampler = OurResampler(self.sampling_rate, method="scipy")
        return parser

    def longest_sound(self) -> int:
        """Samples of the longest sound that the extractor takes without cutting it."""
        extractor = self.get_hf_processor().feature_extractor
        seconds = getattr(extractor, "max_seconds", None) or getattr(extractor, "chunk_length", None) or DEFAULT_SECONDS
        return int(seconds * self.sampling_rate)


class MMLLMDummyInputs(BaseDummyInputsBuilder[MMLLMProcessingInfo]):
    """The largest inputs, for vLLM's memory profiling."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return "".join(mark * mm_counts.get(name, 0) for name, mark in PLACEHOLDERS.items())

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]) -> Any:
        config, data = self.info.get_hf_config(), {}
        if config.vision_config:
            side = int(config.vision_config.get("image_size") or 224)
            data["image"] = self._get_dummy_images(
                width=side, height=side, num_images=mm_counts.get("image", 0), overrides=mm_options.get("image")
            )
        if config.audio_config:
            data["audio"] = self._get_dummy_audios(
                length=self.info.longest_sound(),
                num_audios=mm_counts.get("audio", 0),
                overrides=mm_options.get("audio"),
            )
        return data


class MMLLMMultiModalProcessor(BaseMultiModalProcessor[MMLLMProcessingInfo]):
    """Our processor's tensors by item, and how many placeholder tokens each item becomes."""

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        return {
            "pixel_values": MultiModalFieldConfig.batched("image"),
            "input_features": MultiModalFieldConfig.batched("audio"),
            "feature_attention_mask": MultiModalFieldConfig.batched("audio"),
        }

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        config: Any = self.info.get_hf_config()
        processor = self.info.get_hf_processor(**hf_processor_mm_kwargs)
        updates = []
        if config.vision_config:
            image = config.image_token_id
            updates.append(PromptReplacement("image", target=[image], replacement=[image] * config.image_seq_length))
        if config.audio_config:
            masks = out_mm_kwargs.get_data().get("feature_attention_mask")

            def sound(index: int) -> list[int]:
                assert masks is not None
                return [config.audio_token_id] * processor.num_audio_tokens(int(masks[index].sum()))

            updates.append(PromptReplacement("audio", target=[config.audio_token_id], replacement=sound))
        return updates


@contextmanager
def float32_parts() -> Iterator[None]:
    """Towers and connectors are built and kept in float32, whatever the LLM's dtype, as in training."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@MULTIMODAL_REGISTRY.register_processor(
    MMLLMMultiModalProcessor, info=MMLLMProcessingInfo, dummy_inputs=MMLLMDummyInputs
)
class MMLLMForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsPP, SupportsLoRA):
    """The same module names as our transformers model, so checkpoints load as they are."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return PLACEHOLDERS.get(modality)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config: Any = vllm_config.model_config.hf_config
        check_servable(config.to_dict(), vllm_config.model_config.model)
        self.config, self.dtype = config, vllm_config.model_config.dtype
        text, vision, audio = config.text_config, config.vision_config, config.audio_config
        self.configure_mm_token_handling(text.vocab_size, [config.image_token_id, config.audio_token_id])
        self.vision_tower = self.vision_connector = self.audio_tower = self.audio_connector = None
        if vision:
            with self._mark_tower_model(vllm_config, "image"), float32_parts():
                self.vision_tower = build_tower(vision).float()
                self.vision_connector = build_connector(config.vision_connector).float()
        if audio:
            with self._mark_tower_model(vllm_config, "audio"), float32_parts():
                self.audio_tower = build_tower(audio).float()
                self.audio_connector = build_connector(config.audio_connector).float()
        self.language_model: Any
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=text,
                prefix=maybe_prefix(prefix, "language_model"),
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    # ---- media ------------------------------------------------------------------------------------------------------

    def embed_multimodal(self, **kwargs: Any) -> tuple[Tensor, ...]:
        """LLM tokens [M_i, H] of each item; vLLM calls it for one modality at a time."""
        if kwargs.get("pixel_values") is not None:
            return self._tokens(self.vision_tower, self.vision_connector, pixel_values=kwargs["pixel_values"])
        if kwargs.get("input_features") is not None:
            return self._tokens(
                self.audio_tower,
                self.audio_connector,
                input_features=kwargs["input_features"],
                feature_attention_mask=kwargs["feature_attention_mask"],
            )
        return ()

    def _tokens(self, tower: Any, connector: Any, **inputs: Any) -> tuple[Tensor, ...]:
        """Tower and connector over a stacked batch, or item by item where items differ in length."""
        first = next(iter(inputs.values()))
        if not isinstance(first, Tensor):
            items = [{k: v[i][None] for k, v in inputs.items()} for i in range(len(first))]
            return tuple(t for item in items for t in self._tokens(tower, connector, **item))
        tokens, mask = connector(tower(**inputs))
        return tuple(t[m].to(self.dtype) for t, m in zip(tokens, mask))

    # ---- language model ---------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        if intermediate_tensors is not None:  # a later pipeline stage
            inputs_embeds = None
        return self.language_model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Towers and connectors take their weights by name and completely; the LLM by vLLM's own loader.

        Raises:
            RuntimeError: a tower's or connector's weights are missing or do not fit.
        """
        own: dict[str, dict[str, Tensor]] = {
            name: {} for name in ("vision_tower", "vision_connector", "audio_tower", "audio_connector")
        }

        def rest() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                part, _, tail = name.partition(".")
                if part in own:
                    own[part][tail] = tensor
                else:
                    yield name, tensor

        loaded = set(AutoWeightsLoader(self).load_weights(rest()))
        for part, state in own.items():
            module = getattr(self, part)
            # A modality that is switched off (--limit-mm-per-prompt 0) has only a stand-in here.
            if module is None or isinstance(module, StageMissingLayer):
                continue
            module.load_state_dict(state, strict=True)
            loaded |= {f"{part}.{name}" for name, _ in module.named_parameters()}
        return loaded

    def get_mm_mapping(self) -> MultiModelKeys:
        """Which modules are what, for LoRA adapters on the LLM."""
        return MultiModelKeys.from_string_field(
            language_model="language_model",
            connector=["vision_connector", "audio_connector"],
            tower_model=["vision_tower", "audio_tower"],
        )
