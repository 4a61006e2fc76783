"""The decoder on our own model class, with pictures and sounds in one batch."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_mm import tiny_model

from mmllm.decode import Decoder, Request

RNG = np.random.default_rng(0)
PICTURES = [Image.fromarray(RNG.integers(0, 255, (40, 30, 3), np.uint8)) for _ in range(3)]
WAVES = [RNG.standard_normal(n).astype("f") for n in (8000, 16000)]


def part(content):
    if isinstance(content, str):
        return {"type": "text", "text": content}
    kind = "image" if isinstance(content, Image.Image) else "audio"
    return {"type": kind, kind: content}


def chat(*contents):
    return [{"role": "user", "content": [part(c) for c in contents]}]


CHATS = [
    chat("Is there a cat?"),
    chat(PICTURES[0], "What is in the picture?"),
    chat(PICTURES[0], "Is there a dog, or is there none at all?"),
    chat(WAVES[0], "yes?"),
    chat(WAVES[0], "Is it a bell?"),
    chat("yes", PICTURES[1], "and", WAVES[1], "and", PICTURES[2]),
    chat(PICTURES[0], "a typed <image> mark"),
]


@pytest.fixture(scope="module")
def parts():
    return tiny_model()


def test_greedy_equals_generate(parts):
    model, processor = parts
    decoder = Decoder(model, processor)
    results = decoder.generate([Request(c, max_new_tokens=6) for c in CHATS])
    assert all(decoder.encoder._expands.values())  # the fast way of counting media tokens holds for our processor
    for messages, result in zip(CHATS, results):
        given = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
        reference = model.generate(**given, do_sample=False, max_new_tokens=6)
        new = reference[0, given["input_ids"].shape[1] :].tolist()
        assert result.token_ids == [t for t in new if t not in decoder.end_ids]
        assert result.prompt_tokens == given["input_ids"].shape[1]


@pytest.mark.parametrize("method", ["greedy", "vcd:step=900,beta=0", "ritual:transform=vflip"])
def test_sharing_and_batching_change_nothing(parts, method):
    asked = [Request(c, method, max_new_tokens=5, seed=2) for c in CHATS]
    candidates = [["yes", "no", "a dog, a bell"]] * len(asked)
    shared, alone = Decoder(*parts), Decoder(*parts, share_prefix=False)
    together = shared.generate(asked)
    assert [r.token_ids for r in together] == [alone.generate([r])[0].token_ids for r in asked]
    for a, b in zip(shared.score(asked, candidates), alone.score(asked, candidates)):
        assert a == pytest.approx(b, abs=1e-3)


def test_noise_reaches_sounds_too(parts):
    asked = [Request(CHATS[3]), Request(CHATS[3], "vcd:alpha=1,step=999,beta=0")]
    base, noised = Decoder(*parts).score(asked, [["yes"], ["yes"]])
    assert base[0] != pytest.approx(noised[0], abs=1e-3)


def test_bfloat16_llm_beside_float32_towers():
    model, processor = tiny_model()
    model.language_model.to(torch.bfloat16)
    asked = [Request(c, "vcd", max_new_tokens=3) for c in CHATS]
    scores = Decoder(model, processor).score(asked, [["yes", "no"]] * len(asked))
    assert np.isfinite(scores).all()
    assert len(Decoder(model, processor).generate(asked)) == len(asked)
