"""A tiny world on the spot: coloured squares and tones with their names, a tiny text encoder and a tiny LLM."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "black": (10, 10, 10)}
WORDS = [f"{c} {s}" for c in COLOURS for s in ("square", "bar")]


def _tokenizer(folder):
    pieces = ["[UNK]", "[PAD]", "a", "picture", "of", *COLOURS, "square", "bar", "Ġ"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    return len(pieces)


def _draw(rng, name):
    """RGBA cut-out of one thing."""
    colour, shape = name.split()
    picture = np.zeros((32, 32, 4), np.uint8)
    high = slice(2, 30) if shape == "square" else slice(11, 21)
    picture[high, 2:30] = (*COLOURS[colour], 255)
    noise = rng.integers(-15, 16, (32, 32, 3))
    picture[..., :3] = np.clip(picture[..., :3].astype(int) + noise, 0, 255)
    return Image.fromarray(picture)


def _tone(rng, number):
    t = np.arange(6400) / 16000
    wave = np.sin(2 * np.pi * (300 + 350 * number) * rng.uniform(0.98, 1.02) * t) * np.hanning(len(t))
    return (0.5 * wave + 0.005 * rng.normal(size=len(t))).astype(np.float32)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folder with things_{train,val}.jsonl, scenes_{train,val}.jsonl, sounds_{train,val}.jsonl, text/ and llm/."""
    root = tmp_path_factory.mktemp("world")
    (root / "media").mkdir()
    set_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vocab = _tokenizer(root / "text")
    BertModel(BertConfig(**size, vocab_size=vocab, max_position_embeddings=32)).save_pretrained(root / "text")
    _tokenizer(root / "llm")
    LlamaForCausalLM(LlamaConfig(**size, vocab_size=vocab)).save_pretrained(root / "llm")
    rng = np.random.default_rng(0)
    for split, copies in (("train", 4), ("val", 2)):
        rows = {"things": [], "scenes": [], "sounds": []}
        for number, name in enumerate(WORDS):
            for k in range(copies):
                stem = f"{split}-{number}-{k}"
                _draw(rng, name).save(root / "media" / f"{stem}.png")
                soundfile.write(root / "media" / f"{stem}.wav", _tone(rng, number), 16000, subtype="PCM_16")
                about = {"label": name, "text": [name, f"a picture of {name}"], "meta": {"subgroup": name.split()[1]}}
                rows["things"].append({"id": stem, "image": f"media/{stem}.png", **about})
                rows["sounds"].append({"id": stem, "audio": f"media/{stem}.wav", **about, "text": [name]})
                scene, boxes = Image.new("RGB", (64, 64), (230, 230, 230)), []
                for side in (0, 1):
                    other = name if side == k % 2 else WORDS[rng.integers(len(WORDS))]
                    thing = _draw(rng, other)
                    scene.paste(thing, (32 * side, 16), thing)
                    boxes.append({"xyxy": [0.5 * side, 0.25, 0.5 * side + 0.5, 0.75], "text": other})
                scene.save(root / "media" / f"{stem}-scene.png")
                rows["scenes"].append({"id": stem, "image": f"media/{stem}-scene.png", "boxes": boxes})
        for kind, items in rows.items():
            text = "".join(json.dumps(r) + "\n" for r in items)
            (root / f"{kind}_{split}.jsonl").write_text(text, encoding="utf-8")
    return root


@pytest.fixture
def settings(world):
    """Config of a run over the tiny world, as a dict."""
    vit = {"model": "tiny:vit", "image_size": 64, "patch_size": 16, "hidden_size": 32, "layers": 1, "heads": 2}
    return {
        "dataset": str(world),
        "embedding_dim": 16,
        "words": "words",
        "streams": {
            "image": {
                "modality": "vision",
                "tower": vit,
                "head": {"norm": True},
                "connector": {"type": "grid_mlp", "hidden_dim": 32},
            },
            "text": {"modality": "text", "tower": str(world / "text"), "head": {"bias": False}},
            "audio": {
                "modality": "audio",
                "tower": {"model": "tiny:audio", "hidden_size": 32, "depth": 1},
                "head": {},
                "connector": {"type": "avg_pool", "tokens": 2},
            },
            "words": {"modality": "text", "tower": {"type": "word_embeddings", "model": str(world / "llm")}},
        },
        "train": {"learning_rate": 3e-3, "per_device_train_batch_size": 8, "logging_steps": 20, "save_steps": 20},
        "phases": {
            "both": {
                "sources": {
                    "things": {
                        "data": "things_train.jsonl",
                        "streams": ["image", "text"],
                        "sampler": "distinct",
                        "augment": "cutout",
                    },
                    "sounds": {
                        "data": "sounds_train.jsonl",
                        "streams": ["audio", "text"],
                        "sampler": "distinct",
                        "augment": "sound",
                    },
                },
                "objectives": [
                    {"type": "infonce", "sources": ["things"], "options": {"pair": ["image", "text"]}},
                    {"type": "siglip", "sources": ["sounds"], "weight": 0.3, "options": {"pair": ["audio", "text"]}},
                ],
                "trains": ["image.tower", "image.head", "audio", "text.head"],
                "train": {"max_steps": 60},
            },
            "words": {
                "sources": {
                    "scenes": {"data": "scenes_train.jsonl", "streams": ["image"]},
                    "sounds": {"data": "sounds_train.jsonl", "streams": ["audio"], "copies": 1, "augment": "sound"},
                },
                "objectives": [
                    {"type": "region_align", "sources": ["scenes"], "options": {"stream": "image"}},
                    {"type": "region_align", "sources": ["sounds"], "options": {"stream": "audio"}},
                ],
                "trains": ["image.connector", "audio.connector"],
                "train": {"max_steps": 60},
            },
        },
        "measures": {
            "things": {"kind": "retrieval", "data": "things_val.jsonl", "streams": ["image", "text"]},
            "kinds": {"kind": "zero_shot", "data": "things_val.jsonl", "streams": ["image", "text"]},
            "sounds": {"kind": "retrieval", "data": "sounds_val.jsonl", "streams": ["audio", "text"]},
            "regions": {"kind": "regions", "data": "scenes_val.jsonl", "streams": ["image", "words"]},
            "heard": {"kind": "regions", "data": "sounds_val.jsonl", "streams": ["audio", "words"]},
        },
    }
