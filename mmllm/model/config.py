"""The config of the multimodal LLM: any causal LM of transformers, a tower and a connector for each modality."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig


class MMLLMConfig(PreTrainedConfig):
    """Everything needed to build the model without weights.

    Args:
        text_config: config of the LLM (dict with ``model_type``, or a config object).
        vision_config, audio_config: ``Tower.to_config()`` of the towers; None where the model has no such tower.
        vision_connector, audio_connector: ``Connector.to_config()``.
        injector: ``Injector.to_config()``, where media also reach the LLM through layers inside it.
        turn_token_ids: special tokens that part the turns of a conversation, for connectors that see the question.
        image_token_id, audio_token_id: the placeholder tokens ``<image>`` and ``<audio>`` in ``input_ids``.
        image_seq_length: tokens of one picture (of one view, with ``tiling``) in the LLM; 0 without a vision tower.
        tiling: ``Tiling.to_dict()``, where large pictures are cut into tiles.
        tie_word_embeddings: as in the LLM's own config.
    """

    model_type = "mmllm"
    sub_configs = {"text_config": AutoConfig}  # type: ignore[assignment]

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    vision_config: dict[str, Any] | None = None
    audio_config: dict[str, Any] | None = None
    vision_connector: dict[str, Any] | None = None
    audio_connector: dict[str, Any] | None = None
    injector: dict[str, Any] | None = None
    turn_token_ids: list[int] | None = None
    image_token_id: int | None = None
    audio_token_id: int | None = None
    image_seq_length: int = 0
    tiling: dict[str, int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):
            fields = dict(self.text_config)
            self.text_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        elif self.text_config is None:
            self.text_config = AutoConfig.for_model("llama")
        super().__post_init__(**kwargs)
