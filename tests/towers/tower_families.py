"""Tiny random models of every family of encoders, and how transformers itself would be asked for tokens and pooled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}
WORDS = ["a", "red", "green", "bird", "on", "the", "old", "tree", "sings"]
TEXTS = ["a red bird on the old tree sings", "green tree"]
VOCABULARY = 40


@dataclass
class Family:
    """One family: its modality, how to write a folder, and the reference outputs.

    Attributes:
        write: makes model and preprocessor in a folder.
        expect: (model loaded by transformers alone, inputs of one item) -> tokens [N, D], pooled [D].
        auto: the class of transformers that loads the folder.
        settings: for ``load_tower`` beside ``model``.
    """

    modality: str
    write: Callable[[Path], None]
    expect: Callable[[Any, dict[str, torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]
    auto: Any = tf.AutoModel
    settings: dict[str, Any] = field(default_factory=dict)


def seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for p in model.parameters():  # biases and norms start at 0 and 1, which would hide mistakes
            p.add_(0.05 * torch.randn_like(p))
    return model


# ---- pictures ----


def save_vision(make: Callable[[], Any], processor: Any = None) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        seeded(make).save_pretrained(path)
        size = {"height": 32, "width": 32}
        (processor or tf.CLIPImageProcessorPil(size=size, crop_size=size)).save_pretrained(path)

    return write


def vision(prefix: int, pooled: str) -> Callable[[Any, dict[str, torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]:
    def expect(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        out = getattr(model, "vision_model", model)(**inputs)
        tokens = out.last_hidden_state
        tokens = tokens.flatten(2).transpose(1, 2) if tokens.ndim == 4 else tokens
        kinds = {"pooler": lambda: out.pooler_output.flatten(1), "cls": lambda: tokens[:, 0]}
        return tokens[0, prefix:], kinds[pooled]()[0]

    return expect


def naflex_expect(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    out = model.vision_model(**inputs)
    return out.last_hidden_state[0, inputs["pixel_attention_mask"][0].bool()], out.pooler_output[0]


def siglip2() -> Any:
    text = tf.Siglip2TextConfig(**SMALL, vocab_size=VOCABULARY, max_position_embeddings=16, projection_size=32)
    image = tf.Siglip2VisionConfig(**SMALL, num_patches=16, patch_size=8)
    return tf.Siglip2Model(tf.Siglip2Config(text_config=text.to_dict(), vision_config=image.to_dict()))


def clip() -> Any:
    text = dict(SMALL, vocab_size=VOCABULARY, max_position_embeddings=16, eos_token_id=3, pad_token_id=1)
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=dict(VISION), projection_dim=24))


def siglip(text_width: int = 32) -> Any:
    text = dict(SMALL, hidden_size=text_width, vocab_size=VOCABULARY, max_position_embeddings=16, projection_size=32)
    return tf.SiglipModel(tf.SiglipConfig(text_config=text, vision_config=dict(VISION)))


def registers() -> Any:
    return tf.Dinov2WithRegistersModel(tf.Dinov2WithRegistersConfig(**VISION, num_register_tokens=3))


def dinov3() -> Any:
    return tf.DINOv3ViTModel(tf.DINOv3ViTConfig(**VISION, num_register_tokens=2))


def swin() -> Any:
    config = tf.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    return tf.SwinModel(config)


def convnext() -> Any:
    return tf.ConvNextModel(tf.ConvNextConfig(image_size=64, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1]))


def resnet() -> Any:
    config = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return tf.ResNetModel(config)


def vit_classifier() -> Any:
    return tf.ViTForImageClassification(tf.ViTConfig(**VISION))


class DINOv3Config:
    """Writes what DINOv3's image processor (for torchvision alone) would have saved."""

    def save_pretrained(self, path: Path) -> None:
        import json

        data = {
            "image_processor_type": "DINOv3ViTImageProcessor",
            "size": {"height": 32, "width": 32},
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        }
        (Path(path) / "preprocessor_config.json").write_text(json.dumps(data))


# ---- sounds ----


def save_audio(make: Callable[[], Any], extractor: Callable[[], Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        seeded(make).save_pretrained(path)
        extractor().save_pretrained(path)

    return write


def whisper() -> Any:
    config = tf.WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=100, num_mel_bins=80, vocab_size=60,
        pad_token_id=1, bos_token_id=1, eos_token_id=1, decoder_start_token_id=1,
    )  # fmt: skip
    return tf.WhisperModel(config)


def waveform(kind: str, **more: Any) -> Callable[[], Any]:
    def make() -> Any:
        settings = dict(
            **SMALL, conv_dim=(16, 16), conv_stride=(20, 10), conv_kernel=(30, 12), num_feat_extract_layers=2,
            num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, **more,
        )  # fmt: skip
        return getattr(tf, f"{kind}Model")(getattr(tf, f"{kind}Config")(**settings))

    return make


def ast() -> Any:
    return tf.ASTModel(tf.ASTConfig(**SMALL, max_length=128, num_mel_bins=32))


def clap(fusion: bool = False) -> Any:
    text = dict(SMALL, vocab_size=VOCABULARY, max_position_embeddings=24, projection_hidden_act="relu")
    audio = dict(
        spec_size=64, patch_embeds_hidden_size=16, depths=[1, 1], num_attention_heads=[2, 2], hidden_size=32,
        num_hidden_layers=2, window_size=4, num_mel_bins=64, enable_fusion=fusion,
    )  # fmt: skip
    if fusion:
        audio |= {"fusion_type": "aff_2d", "aff_block_r": 4}
    return tf.ClapModel(tf.ClapConfig(text_config=text, audio_config=audio, projection_dim=24))


def clap_extractor(truncation: str) -> Callable[[], Any]:
    return lambda: tf.ClapFeatureExtractor(
        feature_size=64, sampling_rate=16000, hop_length=500, max_length_s=1, truncation=truncation, frequency_max=8000
    )


def mean_over(lengths: Callable[[Any, dict[str, torch.Tensor]], int]) -> Any:
    """Reference for sounds whose valid tokens come first: the first n tokens and their mean."""

    def expect(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        x = inputs["input_features"]
        if model.config.model_type == "whisper":
            tokens = model.get_encoder()(x).last_hidden_state[0]
        else:
            samples = int(inputs["feature_attention_mask"].sum())
            tokens = model(x[:, :samples]).last_hidden_state[0]
        tokens = tokens[: lengths(model, inputs)]
        return tokens, tokens.mean(0)

    return expect


def ast_expect(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    out = model(inputs["input_features"])
    frames = int(inputs["feature_attention_mask"].sum())
    # 2 rows of 12 columns; a column of ten frames counts when it begins within the sound.
    columns = [c for c in range(12) if 10 * c < frames]
    keep = [0, 1] + [2 + 12 * row + c for row in range(2) for c in columns]
    return out.last_hidden_state[0, keep], out.pooler_output[0]


def clap_expect(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    out = model.audio_model(input_features=inputs["input_features"], is_longer=inputs["is_longer"])
    return out.last_hidden_state.flatten(2)[0].T, out.pooler_output[0]


def conv_length(model: Any, inputs: dict[str, torch.Tensor]) -> int:
    return int(model._get_feat_extract_output_lengths(inputs["feature_attention_mask"].sum()))


# ---- texts ----


def tokenizer(limit: int = 16, pad: bool = True) -> Any:
    pieces = ["<s>", "<pad>", "<unk>", "</s>", *WORDS]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(pieces)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 3)])
    extra = {"pad_token": "<pad>"} if pad else {}
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", eos_token="</s>", model_max_length=limit, **extra
    )


def save_text(make: Callable[[], Any], pad: bool = True) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        seeded(make).save_pretrained(path)
        tokenizer(pad=pad).save_pretrained(path)

    return write


def text(pooled: str) -> Callable[[Any, dict[str, torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]:
    def expect(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        whole = model.config.is_encoder_decoder and not isinstance(model, tf.T5EncoderModel)
        model = model.get_encoder() if whole else getattr(model, "text_model", model)
        valid = inputs["attention_mask"][0].bool()
        whole = model.config.model_type.startswith("siglip")  # looks at its padding, too
        out = model(input_ids=inputs["input_ids"] if whole else inputs["input_ids"][:, valid])
        tokens = out.last_hidden_state[0]
        tokens = tokens[valid] if whole else tokens
        kinds = {"mean": lambda: tokens.mean(0), "last": lambda: tokens[-1], "cls": lambda: tokens[0]}
        return tokens, out.pooler_output[0] if pooled == "pooler" else kinds[pooled]()

    return expect


def bert(kind: str, **more: Any) -> Callable[[], Any]:
    def make() -> Any:
        config = dict(SMALL, vocab_size=VOCABULARY, max_position_embeddings=24, pad_token_id=1, **more)
        return getattr(tf, f"{kind}Model")(getattr(tf, f"{kind}Config")(**config))

    return make


def distilbert() -> Any:
    config = tf.DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, vocab_size=VOCABULARY, pad_token_id=1)
    return tf.DistilBertModel(config)


def t5() -> Any:
    return tf.T5Model(tf.T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=VOCABULARY))


def t5_encoder() -> Any:
    return tf.T5EncoderModel(t5().config)


def llama() -> Any:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, vocab_size=VOCABULARY, max_position_embeddings=64))


def gpt2() -> Any:
    config = tf.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=32, eos_token_id=3)
    return tf.GPT2LMHeadModel(config)


def wav2vec2_extractor() -> Any:
    return tf.Wav2Vec2FeatureExtractor(return_attention_mask=True)


FAMILIES: dict[str, Family] = {
    "clip": Family("vision", save_vision(clip), vision(1, "pooler")),
    "clip_vision": Family(
        "vision", save_vision(lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**VISION))), vision(1, "pooler")
    ),
    "clip_with_projection": Family(
        "vision",
        save_vision(lambda: tf.CLIPVisionModelWithProjection(tf.CLIPVisionConfig(**VISION, projection_dim=8))),
        vision(1, "pooler"),
    ),
    "siglip": Family("vision", save_vision(siglip), vision(0, "pooler")),
    "siglip2": Family(
        "vision", save_vision(siglip2, tf.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=24)), naflex_expect
    ),
    "dinov2": Family("vision", save_vision(lambda: tf.Dinov2Model(tf.Dinov2Config(**VISION))), vision(1, "pooler")),
    "dinov2_registers": Family("vision", save_vision(registers), vision(4, "pooler")),
    "dinov3": Family("vision", save_vision(dinov3, DINOv3Config()), vision(3, "pooler")),
    "vit": Family("vision", save_vision(lambda: tf.ViTModel(tf.ViTConfig(**VISION))), vision(1, "pooler")),
    "vit_without_pooler": Family("vision", save_vision(vit_classifier), vision(1, "cls")),
    "swin": Family("vision", save_vision(swin), vision(0, "pooler")),
    "convnext": Family(
        "vision",
        save_vision(convnext, tf.ConvNextImageProcessorPil(size={"shortest_edge": 64}, crop_pct=1.0)),
        vision(0, "pooler"),
    ),
    "resnet": Family("vision", save_vision(resnet), vision(0, "pooler")),
    "whisper": Family(
        "audio",
        save_audio(whisper, lambda: tf.WhisperFeatureExtractor(chunk_length=2)),
        mean_over(lambda _, x: (int(x["feature_attention_mask"].sum()) + 1) // 2),
    ),
    "wav2vec2": Family("audio", save_audio(waveform("Wav2Vec2"), wav2vec2_extractor), mean_over(conv_length)),
    "wav2vec2_layer": Family(
        "audio",
        save_audio(
            waveform("Wav2Vec2", feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True),
            wav2vec2_extractor,
        ),
        mean_over(conv_length),
    ),
    "hubert": Family("audio", save_audio(waveform("Hubert"), wav2vec2_extractor), mean_over(conv_length)),
    "wavlm": Family(
        "audio", save_audio(waveform("WavLM", feat_extract_norm="layer"), wav2vec2_extractor), mean_over(conv_length)
    ),
    "ast": Family(
        "audio", save_audio(ast, lambda: tf.ASTFeatureExtractor(max_length=128, num_mel_bins=32)), ast_expect
    ),
    "clap": Family("audio", save_audio(clap, clap_extractor("rand_trunc")), clap_expect),
    "clap_fused": Family("audio", save_audio(lambda: clap(True), clap_extractor("fusion")), clap_expect),
    "bert": Family("text", save_text(bert("Bert")), text("mean")),
    "roberta": Family("text", save_text(bert("Roberta")), text("mean")),
    "distilbert": Family("text", save_text(distilbert), text("mean")),
    "t5": Family("text", save_text(t5), text("mean")),
    "t5_encoder": Family("text", save_text(t5_encoder), text("mean"), auto=tf.T5EncoderModel),
    "clip_text": Family("text", save_text(clip), text("pooler")),
    "siglip_text": Family("text", save_text(lambda: siglip(16)), text("pooler")),
    "siglip2_text": Family("text", save_text(siglip2), text("pooler")),
    "clap_text": Family("text", save_text(clap), text("pooler")),
    "llama": Family("text", save_text(llama, pad=False), text("last")),
    "llama_mean": Family("text", save_text(llama), text("mean"), settings={"pooling": "mean"}),
    "gpt2": Family("text", save_text(gpt2, pad=False), text("last")),
}


def items(modality: str) -> list[Any]:
    """Two items of different shape or length, the longer one first."""
    rng = np.random.default_rng(0)
    if modality == "text":
        return TEXTS
    if modality == "audio":
        t = np.arange(20800) / 16000
        long = (0.3 * np.sin(2 * np.pi * 440 * t) + 0.01 * rng.normal(size=len(t))).astype(np.float32)
        return [long, (0.5 * np.sin(1500 * t[:9100])).astype(np.float32)]
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for h, w in ((40, 50), (64, 30))]


def inputs_of(tower: Any, things: list[Any]) -> dict[str, torch.Tensor]:
    from mmllm.towers import audio_inputs, image_inputs

    if tower.modality == "text":
        return tower.encode(things)
    return (audio_inputs if tower.modality == "audio" else image_inputs)(tower.preprocessor(), things)
