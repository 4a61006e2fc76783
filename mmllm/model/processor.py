"""The processor: chat messages, pictures and sounds to model inputs, with one placeholder token per media token."""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer, BatchFeature
from transformers.processing_utils import ProcessorMixin

from mmllm.connectors import build_connector
from mmllm.data.anyres import Tiling
from mmllm.data.blob import Blob
from mmllm.data.conversations import media_of
from mmllm.data.media import image_size
from mmllm.errors import UserError
from mmllm.model.box_tokens import snap_boxes
from mmllm.model.chat_template import AUDIO_TOKEN, IMAGE_TOKEN, placeholder_safe, safe_messages, template_for
from mmllm.towers import MMLLMAudioFeatureExtractor, MMLLMImageProcessor, audio_inputs, build_tower, image_inputs
from mmllm.towers.image_processing import to_rgb

# transformers finds its own preprocessors by name; ours are found here.
OWN: dict[str, Any] = {c.__name__: c for c in (MMLLMImageProcessor, MMLLMAudioFeatureExtractor)}


class MMLLMProcessor(ProcessorMixin):
    """Holds image processor, feature extractor and tokenizer; either of the first two may be None.

    Args:
        image_seq_length: LLM tokens of one picture.
        audio_tower, audio_connector: their configs, from which the number of tokens of a sound is worked out.
        tiling: ``Tiling.to_dict()`` where large pictures are cut; ``image_seq_length`` is then that of one view.
        media_in_place: False where a medium takes one placeholder token and reaches the LLM through an injector.
        box_bins: bins of a coordinate where the LLM has box tokens, see ``mmllm.model.box_tokens``.
    """

    model_input_names = [  # type: ignore[assignment]
        "input_ids", "attention_mask", "pixel_values", "image_grids", "input_features",
        "feature_attention_mask",
    ]  # fmt: skip

    def __init__(
        self,
        image_processor: Any = None,
        feature_extractor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_seq_length: int = 0,
        audio_tower: dict[str, Any] | None = None,
        audio_connector: dict[str, Any] | None = None,
        media_in_place: bool = True,
        tiling: dict[str, int] | None = None,
        box_bins: int | None = None,
    ):
        self.media_in_place, self.tiling, self.box_bins = media_in_place, tiling, box_bins
        self._sizes: dict[str, tuple[int, int]] = {}
        self.image_seq_length, self.audio_tower, self.audio_connector = image_seq_length, audio_tower, audio_connector
        self.image_token, self.audio_token = IMAGE_TOKEN, AUDIO_TOKEN
        self.image_token_id: Any = None
        self.audio_token_id: Any = None
        self._audio_modules: Any = None
        if tokenizer is not None:
            self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
            self.audio_token_id = tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)
            chat_template = chat_template or template_for(tokenizer)
            tokenizer.chat_template = chat_template  # one template, whoever is asked to render
        super().__init__(image_processor, feature_extractor, tokenizer, chat_template=chat_template)

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """A model without eyes or ears has no processor for them."""
        if argument is None or argument_name == "image_processor":  # ours needs no torchvision base class
            return type(argument)
        return super().check_argument_for_proper_class(argument_name, argument)

    @classmethod
    def _get_arguments_from_pretrained(cls, path: Any, processor_dict: Any = None, **kwargs: Any) -> list[Any]:
        saved = processor_dict or {}
        parts: list[Any] = []
        for name, auto in (("image_processor", AutoImageProcessor), ("feature_extractor", AutoFeatureExtractor)):
            fields = saved.get(name)
            own = OWN.get((fields or {}).get(f"{name}_type", ""))
            if own is not None:
                parts.append(own.from_dict(fields))
            else:
                parts.append(auto.from_pretrained(path, **kwargs) if fields else None)
        return [*parts, AutoTokenizer.from_pretrained(path, **kwargs)]

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Writes tokenizer, ``processor_config.json`` (with the preprocessors inside) and ``chat_template.jinja``."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(str(self.chat_template or ""), encoding="utf-8")
        self.to_json_file(folder / "processor_config.json")
        return [str(folder / "processor_config.json")]

    def to_dict(self) -> dict[str, Any]:
        saved = super().to_dict()
        return {k: v for k, v in saved.items() if not k.startswith("_")}

    # ---- how many tokens ----------------------------------------------------------------------------------------

    @property
    def tiles(self) -> Tiling | None:
        """How pictures are cut; None: not at all."""
        return Tiling(**self.tiling) if self.tiling else None

    def picture_grid(self, source: Any) -> tuple[int, int]:
        """Rows and columns of tiles of a picture: a loaded one, or a file of which only the header is read."""
        tiles = self.tiles
        if tiles is None:
            return (1, 1)
        if not _is_file(source):
            return tiles.grid(to_rgb(source).size)
        if not isinstance(source, str):
            return tiles.grid(image_size(source))
        if source not in self._sizes:
            held = io.BytesIO(data_uri(source)) if source.startswith("data:") else source
            self._sizes[source] = image_size(held)
        return tiles.grid(self._sizes[source])

    def picture_tokens(self, source: Any) -> int:
        """LLM tokens of a picture (see ``picture_grid``)."""
        if self.tiling is None or not self.media_in_place:
            return self.image_seq_length
        return Tiling(**self.tiling).tokens(self.picture_grid(source), self.image_seq_length)

    def num_audio_tokens(self, frames: int) -> int:
        """LLM tokens of a sound with ``frames`` valid input frames."""
        if not self.media_in_place:
            return 1
        if self._audio_modules is None:
            if self.audio_tower is None or self.audio_connector is None:
                raise UserError("this model has no audio tower", do="use a model that was tuned with sounds")
            with torch.device("meta"):  # only their arithmetic is wanted, no weights
                self._audio_modules = build_tower(self.audio_tower), build_connector(self.audio_connector)
        tower, connector = self._audio_modules
        return connector.num_tokens(tower.num_tokens(int(frames)))

    # ---- text ---------------------------------------------------------------------------------------------------

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a rendered piece, no special tokens added, one id for each placeholder mark."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def plain_ids(self, text: str) -> list[int]:
        """Token ids of a text in which placeholder marks are only text."""
        return self.text_ids(placeholder_safe(text))

    def expand(self, ids: Sequence[int], image_tokens: Sequence[int], audio_tokens: Sequence[int]) -> list[int]:
        """Repeats each placeholder id as often as its picture or sound has tokens, in order.

        Raises:
            UserError: as many placeholders as media are needed.
        """
        images, sounds, out = iter(image_tokens), iter(audio_tokens), []
        found = {"picture": 0, "sound": 0}
        for token in ids:
            if token == self.image_token_id or token == self.audio_token_id:
                what, counts = ("picture", images) if token == self.image_token_id else ("sound", sounds)
                found[what] += 1
                out += [token] * next(counts, 0)
            else:
                out.append(token)
        for what, given in (("picture", len(image_tokens)), ("sound", len(audio_tokens))):
            if found[what] != given:
                raise UserError(f"the text has places for {found[what]} {what}s, {given} were given")
        return out

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        """The conversation as one string with one mark for each picture and sound."""
        text = self.tokenizer.apply_chat_template(
            safe_messages(messages),
            chat_template=self.chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        return snap_boxes(text, self.box_bins) if self.box_bins else text

    # ---- media --------------------------------------------------------------------------------------------------

    def media_inputs(self, images: Sequence[Any], sounds: Sequence[Any]) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Loaded pictures and waves to tensors, and the number of LLM tokens of each sound."""
        data: dict[str, torch.Tensor] = {}
        counts: list[int] = []
        if len(images):
            if self.image_processor is None:
                raise UserError("this model has no vision tower", do="use a model that was trained with pictures")
            tiles, views = self.tiles, list(images)
            if tiles is not None:
                pictures = [to_rgb(image) for image in images]
                data["image_grids"] = torch.tensor([tiles.grid(p.size) for p in pictures])
                views = [view for picture in pictures for view in tiles.cut(picture)]
            data |= image_inputs(self.image_processor, views)
        if len(sounds):
            if self.feature_extractor is None:
                raise UserError("this model has no audio tower", do="use a model that was tuned with sounds")
            waves = [np.asarray(w, dtype=np.float32).reshape(-1) for w in sounds]
            data |= audio_inputs(self.feature_extractor, waves)
            counts = [self.num_audio_tokens(int(n)) for n in data["feature_attention_mask"].sum(-1)]
        return data, counts

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        audio: Any = None,
        return_tensors: str | None = "pt",
        padding: bool = True,
        padding_side: str = "left",
        **kwargs: Any,
    ) -> BatchFeature:
        """Texts with ``<image>``/``<audio>`` marks and their media to model inputs.

        Args:
            images: one picture or a list (over all texts, in order); nested lists are joined.
            audio: one wave [T] at the extractor's rate or a list.
            padding: pad the texts to the longest, on ``padding_side`` (left is right for generation).

        Returns:
            ``input_ids`` and ``attention_mask`` [B, L], ``pixel_values`` [n, 3, H, W] (with ``tiling`` the views of all
            pictures, and ``image_grids`` [n, 2]), ``input_features`` [m, F, T] and
            ``feature_attention_mask`` [m, T]; only those for which something was given. Without media the marks in the
            text stay single tokens.
        """
        pictures = _flat_list(images)
        sounds = _flat_list(audio)
        data, audio_counts = self.media_inputs(pictures, sounds)
        if text is None:
            return BatchFeature(dict(data))
        texts = [text] if isinstance(text, str) else list(text)
        rows = [self.text_ids(t) for t in texts]
        if pictures or sounds:
            rows = self._expand_rows(rows, [self.picture_tokens(p) for p in pictures], audio_counts)
        width = max((len(r) for r in rows), default=0)
        if return_tensors is None or (not padding and len({len(r) for r in rows}) > 1):
            return BatchFeature({"input_ids": rows, "attention_mask": [[1] * len(r) for r in rows], **data})
        ids = torch.full((len(rows), width), self.pad_id)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            at = slice(width - len(row), width) if padding_side == "left" else slice(0, len(row))
            ids[i, at], mask[i, at] = torch.tensor(row, dtype=torch.long), 1
        return BatchFeature({"input_ids": ids, "attention_mask": mask, **data})

    def _expand_rows(self, rows: list[list[int]], pictures: list[int], audio_counts: list[int]) -> list[list[int]]:
        """Gives each row its share of the media, in order."""
        out, image_at, audio_at = [], 0, 0
        for k, row in enumerate(rows):
            n_image, n_audio = row.count(self.image_token_id), row.count(self.audio_token_id)
            last = k == len(rows) - 1
            n_image, n_audio = (len(pictures) - image_at, len(audio_counts) - audio_at) if last else (n_image, n_audio)
            sizes = pictures[image_at : image_at + n_image]
            out.append(self.expand(row, sizes, audio_counts[audio_at : audio_at + n_audio]))
            image_at, audio_at = image_at + n_image, audio_at + n_audio
        return out

    @property
    def pad_id(self) -> int:
        """The padding token's id; an LLM without one gets its end token (padding is masked anyway)."""
        t = self.tokenizer
        return t.pad_token_id if t.pad_token_id is not None else (t.eos_token_id or 0)

    # ---- chat ---------------------------------------------------------------------------------------------------

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> Any:
        """Messages (or a list of conversations) to a string, or with ``tokenize`` to model inputs, media loaded.

        Content is a string or a list of parts ``{"type": "text", "text"}``, ``{"type": "image", "image" | "path" |
        "url"}``, ``{"type": "audio", "audio" | "path" | "url"}``; media are loaded objects, paths or data URIs.
        """
        many = bool(conversation) and isinstance(conversation[0], (list, tuple))
        conversations: list[Any] = list(conversation) if many else [conversation]
        texts = [self.render(c, add_generation_prompt) for c in conversations]
        if not tokenize:
            return texts if many else texts[0]
        pictures, sounds = [], []
        for messages in conversations:
            for kind, source in media_of(messages):
                if kind == "image":
                    pictures.append(self.load_image(source))
                else:
                    sounds.append(self.load_audio(source))
        out = self(text=texts, images=pictures, audio=sounds, return_tensors=return_tensors, **kwargs)
        return out if return_dict else out["input_ids"]

    def load_image(self, source: Any) -> Any:
        """A path, data URI, blob or encoded bytes as a PIL picture; a picture as it is."""
        from mmllm.data.media import load_image

        if isinstance(source, str) and source.startswith("data:"):
            return load_image(io.BytesIO(data_uri(source)))
        return load_image(source) if _is_file(source) else source

    def load_audio(self, source: Any) -> np.ndarray:
        """A path, data URI, blob or encoded bytes as a wave at the extractor's rate; a wave as it is."""
        from mmllm.data.media import load_audio

        rate = getattr(self.feature_extractor, "sampling_rate", 16000)
        if isinstance(source, str) and source.startswith("data:"):
            with tempfile.NamedTemporaryFile(suffix=".sound") as file:
                file.write(data_uri(source))
                file.flush()
                return load_audio(file.name, rate)
        if _is_file(source):
            return load_audio(source, rate)
        return np.asarray(source, dtype=np.float32)

    def decode_text(self, ids: Sequence[int]) -> str:
        """Token ids as text without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def _flat_list(media: Any) -> list[Any]:
    """None, one medium, a list or nested lists -> a flat list."""
    if media is None:
        return []
    if not isinstance(media, (list, tuple)):
        return [media]
    return [m for item in media for m in (item if isinstance(item, (list, tuple)) else [item])]


def _is_file(source: Any) -> bool:
    return isinstance(source, str | bytes | Blob) or hasattr(source, "__fspath__")


def data_uri(uri: str) -> bytes:
    """The bytes of ``data:TYPE;base64,...``.

    Raises:
        UserError: it is not of that form.
    """
    try:
        return base64.b64decode(uri.split(",", 1)[1], validate=True)
    except (IndexError, ValueError):
        raise UserError("not a valid data URI", uri[:40], "give data:TYPE;base64,...") from None
