"""Tiny LLaVA folders of every kind: CLIP or SigLIP, 'default' or 'full', Llama or Qwen2, tied or not, with or without
a start token that the tokenizer adds."""

import numpy as np
import torch
from PIL import Image
from tiny_mm import tiny_tokenizer
from tokenizers import processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() }}: {% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>\n{% else %}{{ p['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=7
)
TEXT = dict(
    hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512, initializer_range=0.2,
)  # fmt: skip


def tiny_llava(tower="clip", strategy="default", layer=-2, llm="llama", tie=False, start=False, seed=0, **more):
    tokenizer = tiny_tokenizer(chatml=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    if start:
        bos = tokenizer.bos_token
        pair = [(bos, tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", None, pair)
    vision = (CLIPVisionConfig if tower == "clip" else SiglipVisionConfig)(**VISION)
    text = (LlamaConfig if llm == "llama" else Qwen2Config)(
        **TEXT, vocab_size=len(tokenizer), tie_word_embeddings=tie, pad_token_id=0, bos_token_id=0, eos_token_id=0
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy=strategy, vision_feature_layer=layer, **more,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():  # the picture must matter
        model.model.multi_modal_projector.linear_1.weight.mul_(20)
        model.model.multi_modal_projector.linear_2.weight.mul_(40)
        for norm in (m for m in model.model.vision_tower.modules() if isinstance(m, torch.nn.LayerNorm)):
            norm.bias.normal_(std=0.3)
    side = {"height": 28, "width": 28}
    extra = int(tower == "clip")
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=side, crop_size=side), tokenizer, patch_size=7, chat_template=TEMPLATE,
        vision_feature_select_strategy=strategy, num_additional_image_tokens=extra,
    )  # fmt: skip
    return model, processor


def save_llava(folder, **kind):
    model, processor = tiny_llava(**kind)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(seed=1):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (28, 28, 3), np.uint8))


def ask(image):
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Is it a cat?"}]}]
