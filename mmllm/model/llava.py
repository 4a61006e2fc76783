"""A LLaVA folder of transformers as our model: the same weights, layers and prompts, so the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoProcessor, LlavaForConditionalGeneration

from mmllm.blocks.compute import fast_dtype
from mmllm.connectors import MLPConnector
from mmllm.errors import UserError
from mmllm.model.chat_template import IMAGE_TOKEN, LISTED
from mmllm.model.loading import build_model
from mmllm.model.modeling import MMLLMForConditionalGeneration
from mmllm.model.processor import MMLLMProcessor
from mmllm.towers.hf_vision import HFVisionTower


def is_llava(folder: str | Path) -> bool:
    """Whether a folder's ``config.json`` says that it is a ``LlavaForConditionalGeneration``."""
    file = Path(folder) / "config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("model_type") == "llava"
    except (OSError, ValueError, AttributeError):
        return False


def import_llava(
    folder: str | Path, dtype: torch.dtype | None = None
) -> tuple[MMLLMForConditionalGeneration, MMLLMProcessor]:
    """A ``LlavaForConditionalGeneration`` folder or hub id as our model and its processor.

    Logits are those of the LLaVA model on the same prompt and picture, for each of its words; words that our
    placeholders add come after them. Prompts are made by its own chat template.

    Args:
        dtype: of the LLM; None takes ``fast_dtype()``. Tower and connector are float32.

    Raises:
        UserError: nothing loadable there, or something that our parts don't hold: several layers of the tower side by
            side, or another activation than GELU in the projector.
    """
    try:
        llava = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype or fast_dtype())
        made: Any = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as e:
        do = "give the folder of a LlavaForConditionalGeneration, with its processor"
        raise UserError(f"cannot load a LLaVA model ({str(e).strip().splitlines()[0]})", folder, do) from None
    config: Any = llava.config
    _check(config, folder)
    tower = _tower(llava)
    tower.use_preprocessor(made.image_processor)
    model, processor = build_model(
        (_causal_lm(llava), made.tokenizer),
        vision_tower=tower,
        connectors={"vision": _connector(llava)},
        chat_template=_template(made),
    )
    return model, processor


def _check(config: Any, folder: str | Path) -> None:
    layers = config.vision_feature_layer
    if not isinstance(layers, int) and len(layers) != 1:
        raise UserError(f"vision_feature_layer is {list(layers)}: our towers give one layer", folder)
    if config.projector_hidden_act != "gelu":
        raise UserError(f"projector_hidden_act is '{config.projector_hidden_act}': our MLP has 'gelu'", folder)


def _tower(llava: Any) -> HFVisionTower:
    """The tower with the layer and the tokens that LLaVA takes."""
    config, vision = llava.config, llava.model.vision_tower
    layer = config.vision_feature_layer
    layer = layer if isinstance(layer, int) else layer[0]
    # Counted from the start: -1 is the model's last output here, final norm included, and a hidden state in LLaVA.
    layer = layer if layer >= 0 else config.vision_config.num_hidden_layers + 1 + layer
    tower = HFVisionTower(vision.config.to_dict(), layer=layer, model=vision.float())
    first = int(config.vision_feature_select_strategy == "default")
    grid = tower.grid
    assert grid is not None
    tower.cut = 0
    prefix = tower.num_tokens() - grid[1] * grid[2]
    tower.cut, tower._counted = (None if prefix == first else first), None
    return tower


def _connector(llava: Any) -> MLPConnector:
    projector = llava.model.multi_modal_projector
    first, second = projector.linear_1, projector.linear_2
    connector = MLPConnector(first.in_features, second.out_features, hidden_dim=first.out_features)
    with torch.no_grad():
        for ours, theirs in ((connector.mlp[1], first), (connector.mlp[3], second)):
            assert isinstance(ours, nn.Linear)
            ours.weight.copy_(theirs.weight)
            ours.bias.zero_() if theirs.bias is None else ours.bias.copy_(theirs.bias)
    return connector


def _causal_lm(llava: Any) -> Any:
    """LLaVA's decoder and head as the causal LM that they came from."""
    config = llava.config.text_config
    config.tie_word_embeddings = bool(llava.config.tie_word_embeddings)
    config.dtype = llava.dtype
    with torch.device("meta"):  # every weight is put in from LLaVA
        llm: Any = AutoModelForCausalLM.from_config(config)
    setattr(llm, llm.base_model_prefix, llava.model.language_model)
    llm.set_output_embeddings(llava.lm_head)
    if any(t.is_meta for t in (*llm.parameters(), *llm.buffers())):
        raise UserError(f"the LLM is a '{config.model_type}', which has weights that LLaVA's layout lacks")
    llm.generation_config = llava.generation_config
    return llm.eval()


def _template(made: Any) -> str | None:
    """LLaVA's chat template with our placeholder, and with the first token that its tokenizer puts before a prompt."""
    template, tokenizer = made.chat_template or made.tokenizer.chat_template, made.tokenizer
    if not template:
        return None
    if isinstance(template, dict):
        template = template["default"]
    template = LISTED + template.replace(str(made.image_token), IMAGE_TOKEN)
    if tokenizer.bos_token and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        shown = tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}], chat_template=template, tokenize=False
        )
        if not shown.startswith(tokenizer.bos_token):
            template = "{{- bos_token -}}" + template
    return template
