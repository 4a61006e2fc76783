"""Media to LLM tokens: towers and connectors run, their tokens take the places of placeholders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmllm.contracts import Connector, Features, Injector, Tower
from mmllm.errors import UserError
from mmllm.model.config import MMLLMConfig
from mmllm.model.places import Placed, cached_features, put, starts, words_around
from mmllm.model.tiling import TileRows


class MediaParts:
    """What the multimodal LLM does with media before its LLM runs."""

    config: MMLLMConfig
    vision_tower: Tower | None
    audio_tower: Tower | None
    vision_connector: Connector | None
    audio_connector: Connector | None
    injector: Injector | None
    tile_rows: TileRows | None
    get_input_embeddings: Any
    idle_media: dict[str, dict[str, Tensor]] | None  # see ``idle``

    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        image_tower_tokens: Tensor | None = None,
        text: Features | None = None,
        image_grids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Pictures [n, 3, H, W], or their cached tower tokens [n, N, D] -> LLM tokens [n, M, H] and mask [n, M].

        Args:
            text: the words that go with each picture, for a connector that takes them.
            image_grids: [n, 2], with ``tiling``; the pictures are then given as the views of all, in order.
        """
        if self.vision_connector is None or self.vision_tower is None:
            raise UserError("this model has no vision tower", do="use a model that was trained with pictures")
        if image_tower_tokens is not None:
            features = cached_features(image_tower_tokens, None, getattr(self.vision_tower, "grid", None))
        else:
            features = self.vision_tower(pixel_values=pixel_values)
        tokens, mask = self.vision_connector(features, text)
        if self.tile_rows is None:
            return tokens, mask
        if image_grids is None:
            raise UserError("this model cuts pictures into tiles and needs image_grids", do="use its own processor")
        return self.tile_rows(tokens, mask, image_grids)

    def get_audio_features(
        self,
        input_features: Tensor | None = None,
        feature_attention_mask: Tensor | None = None,
        audio_tower_tokens: Tensor | None = None,
        audio_tower_mask: Tensor | None = None,
        text: Features | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sounds [n, F, T] with mask [n, T], or their cached tower tokens [n, N, D] -> LLM tokens and mask [n, M]."""
        if self.audio_connector is None or self.audio_tower is None:
            raise UserError("this model has no audio tower", do="use a model that was tuned with sounds")
        if audio_tower_tokens is not None:
            grid = getattr(self.audio_tower, "grid", None)
            features = cached_features(audio_tower_tokens, audio_tower_mask, grid)
        else:
            features = self.audio_tower(input_features=input_features, feature_attention_mask=feature_attention_mask)
        return self.audio_connector(features, text)

    def embed(self, input_ids: Tensor, **media: Tensor | None) -> Tensor:
        """Token ids [B, L] and the media of the whole batch in order (see ``forward``) -> inputs_embeds [B, L, H].

        Raises:
            UserError: the number of placeholders is not the number of media tokens.
        """
        return self.embed_with_media(input_ids, **media)[0]

    def embed_with_media(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        feature_attention_mask: Tensor | None = None,
        image_tower_tokens: Tensor | None = None,
        audio_tower_tokens: Tensor | None = None,
        audio_tower_mask: Tensor | None = None,
        documents: Tensor | None = None,
        image_grids: Tensor | None = None,
    ) -> tuple[Tensor, list[Placed]]:
        """The same, and the media with their places; ``documents`` [B, L] numbers those of packed rows."""
        embeds, placed = self.get_input_embeddings()(input_ids), []
        in_place = self.injector is None or self.injector.in_place
        words = embeds

        def add(connector: Any, token: int | None, what: str, count: int, run: Any) -> None:
            """``run(text)`` gives the tokens of ``count`` media."""
            nonlocal embeds
            where, text = input_ids == token, None
            if connector is not None and connector.takes_text:
                each = connector.num_tokens(0) if in_place else 1
                rows, columns = starts(where, where.new_full((count,), each, dtype=torch.long), what)
                ids = (self.config.image_token_id, self.config.audio_token_id)
                turns = self.config.turn_token_ids or []
                text = words_around(input_ids, words, rows, columns, turns, ids, documents)
            tokens, mask = run(text)
            counts = mask.sum(1) if in_place else torch.ones_like(mask.sum(1))
            placed.append(Placed(tokens, mask, *starts(where, counts, what)))
            if in_place:
                embeds = put(embeds, where, tokens, mask)

        if pixel_values is not None or image_tower_tokens is not None:
            n = len(pixel_values if image_tower_tokens is None else image_tower_tokens)  # type: ignore[arg-type]

            def pictures(text: Features | None) -> tuple[Tensor, Tensor]:
                return self.get_image_features(pixel_values, image_tower_tokens, text, image_grids)

            add(self.vision_connector, self.config.image_token_id, "picture", n, pictures)
        else:
            embeds = self.idle("vision", embeds)
        if input_features is not None or audio_tower_tokens is not None:
            n = len(input_features if audio_tower_tokens is None else audio_tower_tokens)  # type: ignore[arg-type]

            def sounds(text: Features | None) -> tuple[Tensor, Tensor]:
                return self.get_audio_features(
                    input_features, feature_attention_mask, audio_tower_tokens, audio_tower_mask, text
                )

            add(self.audio_connector, self.config.audio_token_id, "sound", n, sounds)
        else:
            embeds = self.idle("audio", embeds)
        return embeds, placed

    def idle(self, name: str, embeds: Tensor) -> Tensor:
        """The same embeds, after an empty medium of a modality that the batch lacks went through tower and connector.

        DeepSpeed needs it: its processes must run the same modules in the same order, since they gather weights
        (ZeRO-3) and put gradients into buckets (ZeRO-2) as they come, without looking whose they are. ``idle_media``
        holds the inputs by modality; None, as usual: nothing is run.
        """
        if self.idle_media is None or name not in self.idle_media or not torch.is_grad_enabled():
            return embeds
        connector = self.vision_connector if name == "vision" else self.audio_connector
        inputs: dict[str, Any] = {k: v.to(embeds.device) for k, v in self.idle_media[name].items()}
        if connector is not None and connector.takes_text:
            words = embeds[:1, :1]
            inputs["text"] = Features(words, words.new_ones(1, 1, dtype=torch.bool), words[:, 0])
        tokens, _ = self.get_image_features(**inputs) if name == "vision" else self.get_audio_features(**inputs)
        return embeds + tokens.sum().to(embeds.dtype) * 0

    @property
    def takes_text(self) -> bool:
        """True where a connector sees the words around a medium, so that questions can't share its tokens."""
        return any(c is not None and c.takes_text for c in (self.vision_connector, self.audio_connector))

    def unused_connectors(self, *media: Tensor | None) -> Tensor | float:
        """Zero, from the parameters of a connector whose modality this batch lacks.

        Otherwise a process without a picture would give no gradient where the others wait for one. One process does the
        same, so that the optimizer's counts and momenta do not depend on the number of processes.
        """
        if self.idle_media is not None or not torch.is_grad_enabled():
            return 0.0
        pictures, sounds = any(m is not None for m in media[:2]), any(m is not None for m in media[2:])
        parts: list[tuple[Any, bool]] = [(self.vision_connector, pictures), (self.audio_connector, sounds)]
        parts += [(self.vision_tower, pictures), (self.audio_tower, sounds), (self.injector, pictures or sounds)]
        parts.append((self.tile_rows, pictures))
        unused = [p for part, there in parts if part is not None and not there for p in part.parameters()]
        return sum((p.float().sum() * 0 for p in unused if p.requires_grad), torch.zeros(()))
