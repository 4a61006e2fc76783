"""The model that pretrain and tune start from, made from `init` or parts, its batches, and its final folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mmllm.align.folder import FILE as ALIGN_FILE
from mmllm.align.folder import final_align, load_connector
from mmllm.connectors import build_connector
from mmllm.contracts import Connector, Tower
from mmllm.data.chat_batches import ChatBatches
from mmllm.data.conversations import Conversation
from mmllm.data.interleaved import is_document
from mmllm.data.models import resolve_model
from mmllm.data.packing import PackedBatches
from mmllm.errors import UserError
from mmllm.model import MMLLMForConditionalGeneration, MMLLMProcessor, build_model, import_llava, load_model
from mmllm.model.box_tokens import add_box_tokens
from mmllm.model.chat_template import FLATTEN, NAMED, PLAIN
from mmllm.model.llava import is_llava
from mmllm.model.loading import add_injector, add_tiling
from mmllm.model.packing import allow_packing
from mmllm.model.plain_attention import NAME as PLAIN_ATTENTION
from mmllm.model.plain_attention import SHORT_ROW
from mmllm.towers import load_tower
from mmllm.towers.training import merged
from mmllm.train.chat_data import ChatData
from mmllm.train.quantize import plain_llm
from mmllm.train.run import final_folder, read_info
from mmllm.train.tune_config import ModalitySection, TuneConfig

MODALITIES = ("vision", "audio")


def make_model(config: TuneConfig, dtype: torch.dtype) -> tuple[MMLLMForConditionalGeneration, MMLLMProcessor]:
    """The model that a stage starts from.

    Raises:
        UserError: ``init`` is no finished run of align, pretrain or tune and no model; nothing to build from.
    """
    init = Path(config.init) if config.init else None
    if init is not None and not init.exists():
        raise UserError("no such folder", config.init, "give init: the run folder of align or pretrain")
    is_run = init is not None and (init / "run.json").is_file()
    aligned = init is not None and (
        (init / ALIGN_FILE).is_file() or (is_run and read_info(init).get("stage") == "align")
    )
    if init is not None and not aligned:
        if config.llm or config.vision.tower or config.audio.tower:
            raise UserError("init brings LLM and towers already", config.init, "leave out llm and tower, or init")
        if config.chat_template:
            raise UserError("init brings its chat template already", "chat_template", "leave it out")
        model, processor = import_llava(init, dtype) if is_llava(init) else load_model(init, dtype)
        for name in MODALITIES:
            section: ModalitySection = getattr(config, name)
            if section.connector:
                raise UserError("a trained connector can't be changed", f"{name}.connector", "start from the align run")
        if config.injector:
            add_injector(model, processor, config.injector)
        extend(model, processor, config)
        return model, processor
    if aligned and is_run:
        final_folder(init, ["align"])  # type: ignore[arg-type]  (says so when it has not finished)
    towers: dict[str, Tower | None] = {}
    connectors: dict[str, Connector | dict[str, Any] | None] = {}
    for name in MODALITIES:
        towers[name], connectors[name] = _parts(name, getattr(config, name), str(init) if aligned else None)
    if not any(towers.values()):
        raise UserError("no tower", "config", "give init, or vision.tower or audio.tower")
    llm = resolve_model(_llm(config, init))
    template = None if config.chat_template is None else named_template(config.chat_template)
    parts = (llm, towers["vision"], towers["audio"], connectors, dtype, config.injector)
    model, processor = build_model(*parts, chat_template=template)
    extend(model, processor, config)
    return model, processor


def extend(model: MMLLMForConditionalGeneration, processor: MMLLMProcessor, config: TuneConfig) -> None:
    """What a stage adds to the model that it starts from: tiles of large pictures, and box tokens."""
    if config.tiling:
        add_tiling(model, processor, **config.tiling.model_dump())
    if config.box_tokens:
        add_box_tokens(model, processor, config.box_tokens)


def named_template(name: str) -> str:
    """``plain`` (lines that begin with User: and Assistant:), ``short`` (no marks but the ends of question and
    answer), or the template of a Jinja file.

    Raises:
        UserError: there is no such file.
    """
    if name in NAMED:
        return NAMED[name]
    try:
        return FLATTEN + Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        do = "give plain, short, or a Jinja file"
        raise UserError("no such template file", f"chat_template: {name}", do) from None


def check_template(config: TuneConfig, data: ChatData, processor: MMLLMProcessor) -> None:
    """Whether the LLM's words for turns are known, where the data have any.

    Raises:
        UserError: it has no chat template and the config gives none.
    """
    own = config.chat_template is not None or processor.chat_template != PLAIN
    resumed = config.llm is None and config.init is not None  # its first stage was asked this
    if not own and not resumed and not all(is_document(r["messages"]) for r in data.records):
        do = "set chat_template: plain, or a Jinja file, or take an LLM that was tuned for chat"
        raise UserError("this LLM has no chat template", f"llm: {config.llm}", do)


def _llm(config: TuneConfig, init: Path | None) -> str:
    """The LLM of the config, or the one whose words the align run aimed at."""
    if config.llm:
        return config.llm
    words = None
    if init is not None:
        words = json.loads((final_align(init) / ALIGN_FILE).read_text(encoding="utf-8")).get("words")
    if isinstance(words, dict):
        words = words.get("model")
    if not words:
        raise UserError("no LLM", "config", "give llm: a folder, a hub id or starter:smollm2-135m-instruct")
    return words


def _parts(name: str, section: ModalitySection, align_run: str | None) -> tuple[Tower | None, Any]:
    """Tower and connector of one modality, from the config or else from an align run."""
    if section.tower is not None:
        spec = {"model": section.tower} if isinstance(section.tower, str) else dict(section.tower)
        spec["model"] = resolve_model(str(spec.get("model", "")))
        return load_tower(spec, name), section.connector or None
    if align_run is None:
        return None, None
    try:
        connector, about = load_connector(align_run, name)
    except UserError:  # the run aligned no connector for this modality: the model goes without it
        return None, None
    spec = {"model": about["tower"]}
    if about.get("image_size") and name == "vision":
        spec["image_size"] = about["image_size"]
    tower = load_tower(spec, name) if _takes_size(about["tower"]) else load_tower(about["tower"], name)
    grid = getattr(tower, "grid", None)
    changes = dict(section.connector)
    if changes.get("positions") and "grid" not in changes and grid is not None:
        changes["grid"] = list(grid[1:])
    return tower, with_changes(connector, changes)


def _takes_size(folder: str) -> bool:
    """Our own towers can be told a picture size; those of transformers bring theirs."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return "modality" in config and "image_size" in config


def with_changes(connector: Connector, changes: dict[str, Any]) -> Connector:
    """The connector with other settings and all its weights; parameters that are new start fresh.

    One that no longer takes a text (``text_dim: null``) goes without what served the text alone.

    Raises:
        UserError: the changed connector has no place for a trained weight.
    """
    if not changes:
        return connector
    new = build_connector({**connector.to_config(), **changes})
    left = connector.text_parts if connector.takes_text and not new.takes_text else ()
    old = {k: v for k, v in connector.state_dict().items() if not any(part in k for part in left)}
    here = new.state_dict()
    for key, value in old.items():
        if key not in here or here[key].shape != value.shape:
            raise UserError(f"the aligned weight '{key}' does not fit", "connector", "keep the align run's settings")
    new.load_state_dict(old, strict=False)
    return new


def fast_attention(model: MMLLMForConditionalGeneration, config: TuneConfig) -> None:
    """Packed rows attend document by document. On a CPU, other short rows train faster with plain attention than with
    torch's fused one (``mmllm.blocks.plain_attention``). Nothing of this is saved.

    Raises:
        UserError: rows of this LLM can't be packed.
    """
    if config.pack is not None:
        allow_packing(model.language_model)
    elif not torch.cuda.is_available() and config.max_length <= SHORT_ROW:
        model.language_model.set_attn_implementation(PLAIN_ATTENTION)


def make_batches(
    config: TuneConfig,
    data: ChatData,
    processor: MMLLMProcessor,
    media: Any,
    tokenised: dict[int, Conversation] | None = None,
) -> tuple[ChatBatches, int]:
    """The batches of a run, and how many items (conversations, or packed rows) an epoch has.

    Args:
        tokenised: records that are so already, by their numbers.

    Raises:
        UserError: packed rows that are shorter than the longest conversation may be.
    """
    args = (data.records, processor, media.inputs, media.audio_tokens, config.train.per_device_train_batch_size)
    options = (config.train.seed, config.branches_per_row, config.max_length, config.length_normalization)
    more: dict[str, Any] = {"mixture": data.mixture(config.train.seed), "tokenised": tokenised}
    if config.pack is None:
        return ChatBatches(*args, *options, **more), len(data)
    length = (2048 if torch.cuda.is_available() else 1024) if config.pack == "auto" else config.pack
    if length < config.max_length:
        what = f"packed rows of {length} tokens can't hold a conversation of max_length {config.max_length}"
        raise UserError(what, "pack", "raise pack or lower max_length")
    batches = PackedBatches(*args, *options, **more, row_length=length)
    epochs_count = config.train.max_steps is None  # then the whole first epoch is planned now
    return batches, batches.rows_an_epoch() if epochs_count else len(data)


def save_final(
    model: MMLLMForConditionalGeneration, processor: MMLLMProcessor, folder: Path, wide: torch.dtype | None = None
) -> None:
    """Writes a complete model folder; with LoRA also the adapter alone in ``adapter/``, and merged in the weights.

    Args:
        wide: dtype of what was held in 4 bits; None: nothing was.
    """
    for name in MODALITIES:
        tower = getattr(model, f"{name}_tower")
        if tower is not None:
            setattr(model, f"{name}_tower", merged(tower))
    llm: Any = model.language_model
    if hasattr(llm, "merge_and_unload"):
        llm.save_pretrained(folder / "adapter", save_embedding_layers=False)  # embeddings do not train
        model.language_model = llm.merge_and_unload() if wide is None else plain_llm(llm, wide)
    elif wide is not None:
        model.language_model = plain_llm(llm, wide)
    model.cpu().eval().save_pretrained(folder)
    processor.save_pretrained(folder)
