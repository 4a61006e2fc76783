"""The multimodal LLM: tower tokens, carried by connectors, take the places of placeholder tokens in any causal LM."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from mmllm.blocks.head import logits_only_at, loss_at_head
from mmllm.connectors import build_connector, build_injector
from mmllm.data.conversations import branch_mask
from mmllm.errors import UserError
from mmllm.model.branches import without_last_tokens
from mmllm.model.config import MMLLMConfig
from mmllm.model.injection import KEY, after_injection, injected, watch_layers
from mmllm.model.media import MediaParts
from mmllm.model.packing import packed_call
from mmllm.model.places import Placed
from mmllm.model.tiling import TileRows
from mmllm.towers import build_tower

MEDIA_KEYS = (
    "pixel_values",
    "input_features",
    "feature_attention_mask",
    "image_tower_tokens",
    "image_grids",
    "audio_tower_tokens",
    "audio_tower_mask",
)


class MMLLMForConditionalGeneration(MediaParts, PreTrainedModel, GenerationMixin):
    """Parts: ``language_model`` and ``vision_tower``, ``audio_tower``, their connectors and ``injector``, or None.

    Towers and connectors stay in float32 whatever the LLM's dtype: they are small, BatchNorm and log-mel want it, and
    trained numbers and served numbers are then the same.
    """

    config_class = MMLLMConfig
    config: MMLLMConfig
    base_model_prefix = "language_model"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True
    language_model: Any  # any causal LM of transformers, or peft's wrapper around one
    _keep_in_fp32_modules_strict = {
        "vision_tower",
        "audio_tower",
        "vision_connector",
        "audio_connector",
        "injector",
        "tile_rows",
    }

    def __init__(self, config: MMLLMConfig, language_model: nn.Module | None = None):
        super().__init__(config)
        self.vision_tower = build_tower(config.vision_config) if config.vision_config else None
        self.audio_tower = build_tower(config.audio_config) if config.audio_config else None
        self.vision_connector = build_connector(config.vision_connector) if config.vision_connector else None
        self.audio_connector = build_connector(config.audio_connector) if config.audio_connector else None
        # A ready LLM may be handed in (build_model), else it is made from its config.
        self.language_model = (
            AutoModelForCausalLM.from_config(config.text_config) if language_model is None else language_model
        )
        self.injector = build_injector(config.injector) if config.injector else None
        width = self.language_model.get_input_embeddings().weight.shape[1]
        self.tile_rows = TileRows(width) if config.tiling else None
        watch_layers(self.language_model)
        self.idle_media = None
        self._chunked_loss: bool | None = None  # whether the head's loss is known to be this LLM's; tried once
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Towers, connectors and the LLM each set their own starting weights when they are built."""

    def train(self, mode: bool = True) -> MMLLMForConditionalGeneration:
        """Frozen towers stay in eval mode: their BatchNorm and dropout must not move while the rest trains."""
        super().train(mode)
        for tower in (self.vision_tower, self.audio_tower):
            if tower is not None and not any(p.requires_grad for p in tower.parameters()):
                tower.eval()
        return self

    # ---- parts ----------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """The LLM's; what a saved config names, so that the model computes alike when it is loaded again."""
        return self.language_model.get_input_embeddings().weight.dtype

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    # ---- forward ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        feature_attention_mask: Tensor | None = None,
        image_tower_tokens: Tensor | None = None,
        image_grids: Tensor | None = None,
        audio_tower_tokens: Tensor | None = None,
        audio_tower_mask: Tensor | None = None,
        branch_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        labels: Tensor | None = None,
        label_weights: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items: float | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Runs the LLM on text with media in place.

        Args:
            image_grids: [n, 2] rows and columns of tiles of each picture, for a model with ``tiling``; ``pixel_values``
                and ``image_tower_tokens`` then hold the views of all pictures one after the other.
            attention_mask: [B, L], or an additive float mask [B, 1, L, K].
            branch_ids: [B, L] of ``mmllm.data.conversations``; makes the mask under which branches share a prefix.
            document_ids: [1, T], numbers of the documents of a packed row (``mmllm.data.packing``): each is computed as
                if it stood alone, and ``attention_mask`` is not looked at.
            labels: [B, L], -100 where nothing is asked. Then ``loss`` is the mean over the labelled tokens, made in
                chunks (``mmllm.blocks.lm_head_loss``), and there are no ``logits``. The last token of a branch, from
                which nothing is predicted, is then left out.
            label_weights: [B, L], makes the mean a weighted one.
            logits_to_keep: as in transformers; without labels.
            num_items: number (or weight) of labelled tokens, for the training loop; not used here.
        """
        placed: list[Placed] = []
        if branch_ids is not None and self.takes_text:
            raise UserError("a connector that sees the question takes one question a row", do="set branches_per_row: 1")
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            inputs_embeds, placed = self.embed_with_media(
                input_ids,
                pixel_values,
                input_features,
                feature_attention_mask,
                image_tower_tokens,
                audio_tower_tokens,
                audio_tower_mask,
                document_ids,
                image_grids,
            )
        asked = None if labels is None else labels[:, 1:] != -100
        rows: Any = None
        columns: Any = None
        if asked is not None:
            rows, columns = asked.nonzero(as_tuple=True)
        if branch_ids is not None and document_ids is None:
            if rows is not None and len(rows) and position_ids is not None and self.injector is None:
                branch_ids, inputs_embeds, position_ids, columns = without_last_tokens(
                    branch_ids, inputs_embeds, position_ids, rows, columns
                )
            attention_mask = branch_mask(branch_ids, inputs_embeds.dtype)
        run: dict[str, Any] = dict(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache if labels is None else False,
            **kwargs,
        )
        if document_ids is not None:
            run |= packed_call(self.language_model, document_ids, branch_ids, position_ids)
        media = None
        if self.injector is not None:
            media = run[KEY] = injected(self.injector, placed, inputs_embeds, past_key_values, branch_ids, document_ids)
        if labels is None:
            out = self.language_model(**run, logits_to_keep=logits_to_keep)
            after_injection(self, media, out)
            return out
        # No labelled token (all answers cut away): a zero that still has a gradient path, so no process waits.
        loss: Any = inputs_embeds.float().sum() * 0
        if rows is not None and len(rows):
            share = None if label_weights is None else label_weights[:, 1:][asked]
            each, out = self._answer_loss(run, rows, columns, labels[:, 1:][asked], share)
            loss = loss + each
        else:
            out = self.language_model(**run, logits_to_keep=1)
            loss = loss + out.logits.float().sum() * 0
        after_injection(self, media, out)
        held = (image_tower_tokens, pixel_values, audio_tower_tokens, input_features)
        loss = loss + self.unused_connectors(*held)
        return CausalLMOutputWithPast(loss=loss, hidden_states=out.hidden_states, attentions=out.attentions)

    def _answer_loss(
        self, run: dict[str, Any], rows: Tensor, columns: Tensor, targets: Tensor, share: Tensor | None
    ) -> tuple[Tensor, Any]:
        """The loss at the places (rows[i], columns[i]) and the LLM's output; logits exist chunk by chunk alone."""
        if self._chunked_loss is not False:
            with loss_at_head(self, rows, columns, targets, share) as found:
                out = self.language_model(**run)
            assert found.loss is not None and found.first is not None
            if self._chunked_loss is None:
                same = out.logits.shape == found.first.shape
                self._chunked_loss = same and torch.allclose(out.logits, found.first, rtol=1e-2, atol=1e-2)
            if self._chunked_loss:
                return found.loss, out
        # This LLM changes its logits in a way of its own: they must be made as it makes them.
        with logits_only_at(self, rows, columns):
            out = self.language_model(**run)
        each = F.cross_entropy(out.logits[0].float(), targets, reduction="none")
        share = torch.ones_like(each) if share is None else share.to(each)
        return (each * share).sum() / share.sum(), out

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        media = {k: kwargs.pop(k) for k in MEDIA_KEYS if k in kwargs}
        first = kwargs.get("is_first_iteration", False) or not kwargs.get("use_cache", True)
        inputs = GenerationMixin.prepare_inputs_for_generation(self, input_ids, **kwargs)  # type: ignore[attr-defined]
        return {**inputs, **media} if first else inputs
