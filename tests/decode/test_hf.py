"""The adapter for transformers' generate: the same tokens as the engine and, for greedy, as generate itself."""

import pytest
import torch
from tiny_llava import ask, picture, tiny_llama, tiny_llava

from mmllm.decode import Decoder, Request
from mmllm.decode.hf import generate_views
from mmllm.errors import UserError

MESSAGES = [ask("hi there", picture(1)), ask("how many", picture(2))]


@pytest.fixture(scope="module")
def llava():
    model, processor = tiny_llava()
    processor.tokenizer.padding_side = "left"
    given = processor.apply_chat_template(
        MESSAGES, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip
    return model, processor, given


def run(llava, decode, **more):
    model, _, given = llava
    return model.generate(**given, max_new_tokens=8, custom_generate=generate_views, decode=decode, **more)


def test_greedy_equals_generate(llava):
    model, _, given = llava
    assert torch.equal(
        run(llava, "greedy", do_sample=False), model.generate(**given, do_sample=False, max_new_tokens=8)
    )


@pytest.mark.parametrize(
    "method",
    ["vcd:step=900", "no_image", "ritual:transform=hflip", "patch_shuffle", "dola", "pai", "avisc", "vista:layers=1"],
)
def test_methods_equal_the_engine(llava, method):
    model, processor, given = llava
    out = run(llava, method, do_sample=False)
    length = given["input_ids"].shape[1]
    for i, messages in enumerate(MESSAGES):
        result = Decoder(model, processor).generate([Request(messages, method, 8, seed=i)])[0]
        assert out[i, length:].tolist()[: len(result.token_ids)] == result.token_ids


def test_the_streamer_gets_every_token(llava):
    class Keep:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, tokens):
            self.tokens += tokens.tolist()

        def end(self):
            self.ended = True

    model, processor, _ = llava
    given = processor.apply_chat_template(
        MESSAGES[:1], tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    keep = Keep()
    out = model.generate(
        **given, max_new_tokens=8, do_sample=False, custom_generate=generate_views, decode="vcd", token_streamer=keep
    )
    assert keep.ended and keep.tokens == out[0, given["input_ids"].shape[1] :].tolist()


def test_generation_settings_still_hold(llava):
    length = llava[2]["input_ids"].shape[1]
    first = run(llava, "vcd:beta=0", do_sample=False)[:, length].tolist()
    held = run(llava, "vcd:beta=0", do_sample=False, suppress_tokens=first, min_new_tokens=8)[:, length:]
    assert not set(first) & set(held.flatten().tolist()) and held.shape[1] == 8
    drawn = run(llava, "vcd", do_sample=True, num_return_sequences=3, top_k=30, decode_seed=4)
    assert len(drawn) == 6
    assert torch.equal(drawn, run(llava, "vcd", do_sample=True, num_return_sequences=3, top_k=30, decode_seed=4))
    assert len({tuple(row.tolist()) for row in drawn[:3]}) > 1


def test_text_only_models_too():
    model, tokenizer = tiny_llama()
    ids = tokenizer("hello", return_tensors="pt")["input_ids"]
    mask = torch.ones_like(ids)
    how = dict(attention_mask=mask, max_new_tokens=6, do_sample=False)
    out = model.generate(ids, **how, custom_generate=generate_views, decode="apc")
    assert torch.equal(out, model.generate(ids, **how))


def test_what_needs_messages_says_so(llava):
    with pytest.raises(UserError, match="Decoder"):
        run(llava, "icd", do_sample=False)
    with pytest.raises(UserError, match="picture itself"):
        run(llava, "ritual:transform=jitter", do_sample=False)
