"""Builds a multimodal LLM from its parts, and loads a trained one from a run or a model folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mmllm.blocks.compute import fast_dtype
from mmllm.connectors import build_connector, build_injector
from mmllm.contracts import Connector, Tower
from mmllm.data.anyres import Tiling
from mmllm.errors import UserError
from mmllm.model.chat_template import AUDIO_TOKEN, IMAGE_TOKEN
from mmllm.model.config import MMLLMConfig
from mmllm.model.injection import decoder_layers
from mmllm.model.modeling import MMLLMForConditionalGeneration
from mmllm.model.processor import MMLLMProcessor
from mmllm.model.tiling import TileRows
from mmllm.towers import image_inputs

log = logging.getLogger(__name__)
STAGES = ("pretrain", "tune")


def load_llm(llm: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A causal LM and its tokenizer from a folder or hub id.

    Raises:
        UserError: nothing loadable there.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(llm)
        model = AutoModelForCausalLM.from_pretrained(llm, dtype=dtype)
    except (OSError, ValueError, KeyError) as e:
        raise UserError(
            f"cannot load an LLM ({str(e).splitlines()[0]})",
            llm,
            "give a folder or hub id of a causal LM of transformers",
        ) from None
    return model, tokenizer


def build_model(
    llm: str | tuple[Any, Any],
    vision_tower: Tower | None = None,
    audio_tower: Tower | None = None,
    connectors: dict[str, Connector | dict[str, Any] | None] | None = None,
    dtype: torch.dtype | None = None,
    injector: dict[str, Any] | None = None,
    chat_template: str | None = None,
) -> tuple[MMLLMForConditionalGeneration, MMLLMProcessor]:
    """Joins an LLM, towers and connectors into one model with its processor.

    Args:
        llm: folder or hub id of any causal LM, or (model, tokenizer).
        connectors: "vision" and "audio" -> a Connector or a config for one (``in_dim`` and ``out_dim`` are filled in);
            without an entry a tower gets ``grid_mlp`` when its tokens lie on a grid, else ``mlp``.
        dtype: of the LLM; None takes ``fast_dtype()``. Towers and connectors are float32.
        injector: config of layers inside the LLM (``dim`` and ``layers`` are filled in), see ``add_injector``.
        chat_template: None: that of ``template_for``.

    The tokenizer gets the placeholder tokens; their embeddings (the mean of the others) are never read, since media
    tokens take their places.
    """
    model, tokenizer = load_llm(llm, dtype or fast_dtype()) if isinstance(llm, str) else llm
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN, AUDIO_TOKEN]})
    _grow_embeddings(model, len(tokenizer))
    width = model.get_input_embeddings().weight.shape[1]
    towers = {"vision": vision_tower, "audio": audio_tower}
    ready = {k: _connector(t, (connectors or {}).get(k), width) for k, t in towers.items() if t is not None}
    for name in connectors or {}:
        if towers.get(name) is None and (connectors or {})[name] is not None:
            raise UserError(f"a connector for '{name}' without a tower", do=f"give a {name} tower too")
    image_length = 0
    if vision_tower is not None:
        image_length = ready["vision"].num_tokens(getattr(vision_tower, "grid", None) or vision_tower.num_tokens())
    config = MMLLMConfig(
        text_config=model.config.to_dict(),
        vision_config=vision_tower.to_config() if vision_tower is not None else None,
        audio_config=audio_tower.to_config() if audio_tower is not None else None,
        vision_connector=ready["vision"].to_config() if "vision" in ready else None,
        audio_connector=ready["audio"].to_config() if "audio" in ready else None,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        audio_token_id=tokenizer.convert_tokens_to_ids(AUDIO_TOKEN),
        image_seq_length=image_length,
        tie_word_embeddings=bool(model.config.tie_word_embeddings),
    )
    whole = MMLLMForConditionalGeneration(config, language_model=model)
    for name, tower in towers.items():
        if tower is not None:
            setattr(whole, f"{name}_tower", tower.float())
            setattr(whole, f"{name}_connector", ready[name].float())
    processor = MMLLMProcessor(
        image_processor=vision_tower.preprocessor() if vision_tower is not None else None,
        feature_extractor=audio_tower.preprocessor() if audio_tower is not None else None,
        tokenizer=tokenizer,
        chat_template=chat_template,
        image_seq_length=image_length,
        audio_tower=config.audio_config,
        audio_connector=config.audio_connector,
    )
    whole.generation_config = _generation_config(model, processor)
    if whole.takes_text:
        config.turn_token_ids = turn_tokens(processor)
    if injector:
        add_injector(whole, processor, injector)
    return whole.eval(), processor


def add_injector(model: MMLLMForConditionalGeneration, processor: MMLLMProcessor, settings: dict[str, Any]) -> None:
    """Gives a model layers inside the LLM through which media reach it; its logits stay as they are, bit for bit.

    With ``in_place: false``, the default of Flamingo's kind, a medium is one placeholder token from now on, and the
    processor makes its inputs so.

    Raises:
        UserError: an impossible setting, or a model that has an injector already.
    """
    if model.injector is not None:
        raise UserError("this model has an injector already", "injector", "leave out injector")
    embedding: Any = model.get_input_embeddings()
    layers, width = decoder_layers(model.language_model), embedding.weight.shape[1]
    model.injector = build_injector({**settings, "dim": width, "layers": len(layers)}).float()
    model.config.injector = model.injector.to_config()
    if not model.injector.in_place:
        processor.media_in_place = False
        processor.image_seq_length = model.config.image_seq_length = min(processor.image_seq_length, 1)


def add_tiling(
    model: MMLLMForConditionalGeneration, processor: MMLLMProcessor, max_tiles: int, min_tiles: int = 1
) -> None:
    """Lets a model see large pictures as a thumbnail and tiles; those that fit one tile stay as they were, bit for bit.

    Raises:
        UserError: no vision tower, one that takes pictures of any shape, a connector that sees the question, numbers
            that leave nothing to cut, or a model that cuts already.
    """
    if model.tile_rows is not None:
        raise UserError("this model cuts pictures already", "tiling", "leave out tiling")
    if model.vision_tower is None or processor.image_processor is None:
        raise UserError("there is no vision tower to see the tiles", "tiling", "give vision.tower")
    if model.vision_connector is not None and model.vision_connector.takes_text:
        raise UserError("a connector that sees the question takes whole pictures", "tiling", "leave out tiling")
    seen = image_inputs(processor.image_processor, [Image.new("RGB", (8, 8))])["pixel_values"]
    if seen.ndim != 4 or seen.shape[-1] != seen.shape[-2]:
        raise UserError("this tower takes pictures of any shape as they are", "tiling", "leave out tiling")
    tiling = Tiling(max_tiles, int(seen.shape[-1]), min_tiles).to_dict()
    embedding: Any = model.get_input_embeddings()
    model.tile_rows = TileRows(embedding.weight.shape[1]).float()
    model.config.tiling = processor.tiling = tiling


def turn_tokens(processor: MMLLMProcessor) -> list[int]:
    """The special tokens that part the turns of the chat template, and padding.

    Raises:
        UserError: none stands between a question and its answer, so the words of a turn can't be told.
    """
    tokenizer = processor.tokenizer
    media = {processor.image_token_id, processor.audio_token_id}
    ids = sorted({*tokenizer.all_special_ids, processor.pad_id} - media)
    text = processor.render([{"role": "user", "content": "QMARK"}, {"role": "assistant", "content": "AMARK"}])
    between = text.split("QMARK")[-1].split("AMARK")[0]
    if set(processor.text_ids(between)).isdisjoint(ids):
        raise UserError(
            "the chat template has no special token between question and answer",
            "connector 'qformer'",
            "leave out text_dim, or use an LLM with such a template",
        )
    return ids


def _connector(tower: Tower, wanted: Connector | dict[str, Any] | None, width: int) -> Connector:
    if isinstance(wanted, Connector):
        held = wanted.to_config()
        out, taken = held.get("out_dim", width), held.get("in_dim", tower.hidden_size)
        if taken != tower.hidden_size:
            raise UserError(
                f"the connector takes {taken} numbers a token, the tower gives {tower.hidden_size}",
                do="use the tower that it was aligned with",
            )
        if out != width:
            raise UserError(
                f"the connector gives {out} numbers a token, the LLM takes {width}",
                do="align against this LLM's word embeddings, or use another connector",
            )
        return wanted
    grid = getattr(tower, "grid", None)
    config: dict[str, Any] = dict(wanted or {"type": "grid_mlp" if grid is not None else "mlp"})
    if config.get("positions") and not config.get("grid") and grid is not None:
        config["grid"] = list(grid[1:])
    for key, needed, whose in (("in_dim", tower.hidden_size, "tower gives"), ("out_dim", width, "LLM takes")):
        if config.setdefault(key, needed) != needed:
            what = f"{key} is {config[key]}, the {whose} {needed} numbers a token"
            raise UserError(what, "connector", f"leave {key} out")
    return build_connector(config)


def _grow_embeddings(model: Any, tokens: int) -> None:
    """Adds rows for new tokens; each new row is the mean of the old ones, so its logit is never the largest."""
    old = model.get_input_embeddings().weight.shape[0]
    if tokens <= old:
        return
    model.resize_token_embeddings(tokens, mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if module is not None:
                module.weight[old:] = module.weight[:old].float().mean(0).to(module.weight.dtype)


def _generation_config(model: Any, processor: MMLLMProcessor) -> GenerationConfig:
    """Greedy by default, ending at the LLM's own end token or at the one that closes an answer in its template."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    tokenizer = processor.tokenizer
    for token in (tokenizer.eos_token_id, end_of_answer(processor)):
        if token is not None and token not in ends:
            ends.append(token)
    return GenerationConfig(
        do_sample=False, eos_token_id=ends, pad_token_id=processor.pad_id, bos_token_id=tokenizer.bos_token_id
    )


def end_of_answer(processor: MMLLMProcessor) -> int | None:
    """The token that closes an assistant's answer in the chat template; None when the template closes with none."""
    mark = "ANSWERMARK"
    text = processor.render([{"role": "user", "content": "q"}, {"role": "assistant", "content": mark}])
    ids = processor.text_ids(text.rsplit(mark, 1)[-1])
    special = set(processor.tokenizer.all_special_ids)
    return ids[0] if ids and ids[0] in special else None


def load_model(
    path: str | Path, dtype: torch.dtype | str | None = None, device: torch.device | str = "cpu"
) -> tuple[MMLLMForConditionalGeneration, MMLLMProcessor]:
    """Loads a trained model and its processor.

    Args:
        path: a run folder of pretrain or tune (its ``final/`` is taken), a model folder, or a hub id.
        dtype: of the LLM; None keeps the saved one, except that bfloat16 becomes float32 on machines where it is slow.
        device: where the model is put; ``auto`` is the first GPU where there is one, else the CPU.

    Raises:
        UserError: a run of another stage, an unfinished run, or a folder that holds no mmllm model.
    """
    folder = _model_folder(path)
    if dtype is None:
        dtype = "auto" if fast_dtype() == torch.bfloat16 else torch.float32
    try:
        model = MMLLMForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        processor = MMLLMProcessor.from_pretrained(folder)
    except OSError as e:
        raise UserError(f"cannot load the model ({str(e).splitlines()[0]})", path) from None
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    whole: Any = model.eval()
    return whole.to(device), processor


def _model_folder(path: str | Path) -> str:
    folder = Path(path)
    if not folder.exists():
        if str(path).count("/") == 1 and not str(path).startswith((".", "/", "runs/")):
            return str(path)  # a hub id
        raise UserError("no such folder", path, "give a run folder of pretrain or tune, or a model folder")
    run = folder / "run.json"
    if run.is_file():
        stage = json.loads(run.read_text(encoding="utf-8")).get("stage")
        if stage not in STAGES:
            raise UserError(f"this is a run of '{stage}'", path, "give a run of pretrain or tune")
        if not (folder / "final" / "config.json").is_file():
            raise UserError("this run has not finished", path, f"finish it with mmllm {stage} ... --resume")
        folder = folder / "final"
    config = folder / "config.json"
    if not config.is_file():
        raise UserError("no model here (config.json)", path, "give a run folder of pretrain or tune, or a model folder")
    kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    if kind != "mmllm":
        raise UserError(f"this is a '{kind}' model, not an mmllm one", path, "give a run of pretrain or tune")
    return str(folder)
