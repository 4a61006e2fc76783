"""The model: media land in their places, cached tokens equal fresh ones, padding changes nothing, folders reload."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_mm import tiny_llm, tiny_model, tiny_towers
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmllm.errors import UserError
from mmllm.model import MMLLMForConditionalGeneration, MMLLMProcessor, build_model, load_model
from mmllm.model.chat_template import NAMED

RNG = np.random.default_rng(0)
PICTURES = [Image.fromarray(RNG.integers(0, 255, (40, 30, 3), np.uint8)) for _ in range(3)]
WAVES = [RNG.standard_normal(n).astype("f") for n in (8000, 16000)]


def part(media):
    return {"type": "image", "image": media} if isinstance(media, Image.Image) else {"type": "audio", "audio": media}


def ask(*content):
    parts = [{"type": "text", "text": c} if isinstance(c, str) else part(c) for c in content]
    return [{"role": "user", "content": parts}]


CHATS = [
    ask("Is there a cat?"),
    ask(PICTURES[0], "What is in the picture?"),
    ask(WAVES[0], "yes?"),
    ask("yes", PICTURES[1], "and", WAVES[1], "and", PICTURES[2]),
]


def prepare(processor, chats):
    return processor.apply_chat_template(chats, tokenize=True, add_generation_prompt=True)


@pytest.fixture(scope="module")
def parts():
    return tiny_model()


def test_media_tokens_stand_in_the_places_of_their_placeholders(parts):
    model, processor = parts
    batch = prepare(processor, CHATS[3])
    ids = batch["input_ids"][0]
    media = {k: v for k, v in batch.items() if k != "attention_mask"}
    with torch.no_grad():
        embeds = model.embed(**media)[0]
        tokens, _ = model.get_image_features(batch["pixel_values"])
        sounds, mask = model.get_audio_features(batch["input_features"], batch["feature_attention_mask"])
    torch.testing.assert_close(embeds[ids == processor.image_token_id], tokens.flatten(0, 1))
    torch.testing.assert_close(embeds[ids == processor.audio_token_id], sounds[mask])
    text = (ids != processor.image_token_id) & (ids != processor.audio_token_id)
    torch.testing.assert_close(embeds[text], model.get_input_embeddings()(ids[text]))


def test_cached_tower_tokens_give_the_same_logits(parts):
    model, processor = parts
    batch = prepare(processor, CHATS[3])
    with torch.no_grad():
        fresh = model(**batch).logits
        seen = model.vision_tower(batch["pixel_values"])
        heard = model.audio_tower(batch["input_features"], batch["feature_attention_mask"])
        cached = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            image_tower_tokens=seen.tokens,
            audio_tower_tokens=heard.tokens,
            audio_tower_mask=heard.mask,
        )
    torch.testing.assert_close(cached.logits, fresh)


def test_a_padded_mixed_batch_generates_what_each_request_generates_alone(parts):
    model, processor = parts
    batch = prepare(processor, CHATS)
    together = model.generate(**batch, max_new_tokens=8)[:, batch["input_ids"].shape[1] :]
    for row, chat in zip(together, CHATS):
        single = prepare(processor, chat)
        alone = model.generate(**single, max_new_tokens=8)[0, single["input_ids"].shape[1] :]
        assert row[: len(alone)].tolist() == alone.tolist()


def test_generation_with_a_cache_equals_repeated_full_forwards(parts):
    model, processor = parts
    batch = dict(prepare(processor, CHATS[3]))
    start = batch["input_ids"].shape[1]
    fast = model.generate(**batch, max_new_tokens=6, eos_token_id=None)[0, start:].tolist()
    slow = []
    for _ in range(6):
        with torch.no_grad():
            token = int(model(**batch).logits[0, -1].argmax())
        slow.append(token)
        batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([[token]])], 1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    assert fast == slow


@pytest.mark.parametrize("tie", [True, False])
def test_model_folder_round_trip_and_auto_classes(tmp_path, tie):
    vision, audio = tiny_towers()
    model, processor = build_model(tiny_llm(tie=tie), vision, audio, {"vision": {"type": "mlp"}}, dtype=torch.float32)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, again_processor = load_model(tmp_path, torch.float32)
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b), name
    assert torch.equal(
        model.generate(**prepare(processor, CHATS), max_new_tokens=4),
        again.generate(**prepare(again_processor, CHATS), max_new_tokens=4),
    )
    assert again.generation_config.eos_token_id == model.generation_config.eos_token_id
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), MMLLMProcessor)
    low = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert isinstance(low, MMLLMForConditionalGeneration)
    assert low.get_input_embeddings().weight.dtype == torch.bfloat16
    assert {p.dtype for n, p in low.named_parameters() if not n.startswith("language_model")} == {torch.float32}


def test_a_saved_model_computes_in_its_llms_number_format_again(tmp_path, monkeypatch):
    monkeypatch.setenv("MMLLM_DTYPE", "bfloat16")
    llm, tokenizer = tiny_llm()
    model, processor = build_model((llm.bfloat16(), tokenizer), *tiny_towers())
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = load_model(tmp_path)
    assert again.dtype == again.get_output_embeddings().weight.dtype == torch.bfloat16
    assert {p.dtype for p in again.vision_tower.parameters()} == {torch.float32}


def test_a_model_with_eyes_only_says_so_when_it_gets_a_sound(tmp_path):
    model, processor = build_model(tiny_llm(), tiny_towers()[0], dtype=torch.float32)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, processor = load_model(tmp_path)
    assert again.audio_tower is None and processor.feature_extractor is None
    again.generate(**prepare(processor, CHATS[1]), max_new_tokens=2)
    with pytest.raises(UserError, match="audio tower"):
        prepare(processor, CHATS[2])


def test_placeholder_marks_typed_by_a_user_are_only_text(parts):
    model, processor = parts
    batch = prepare(processor, ask(PICTURES[0], "what is <image> and <audio>?"))
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == processor.image_seq_length
    model(**batch)


def test_wrong_numbers_of_media_are_refused(parts):
    model, processor = parts
    with pytest.raises(UserError, match="places for 1 pictures, 2"):
        processor(text="<image>", images=PICTURES[:2])
    batch = prepare(processor, CHATS[1])
    with pytest.raises(UserError, match="placeholders"):
        model(input_ids=batch["input_ids"][:, :8], pixel_values=batch["pixel_values"])


def test_number_of_sound_tokens_is_known_without_running_the_model():
    model, processor = tiny_model(connectors={"audio": {"type": "qformer", "num_queries": 3, "hidden_dim": 16}})
    batch = prepare(processor, CHATS[2])
    assert int((batch["input_ids"] == processor.audio_token_id).sum()) == 3


def test_new_tokens_change_nothing_for_the_old_ones():
    model, tokenizer = tiny_llm()
    ids = torch.tensor([[5, 9, 40, 7]])
    with torch.no_grad():
        before = model(ids).logits
        whole, _ = build_model((model, tokenizer), tiny_towers()[0], dtype=torch.float32)
        after = whole(input_ids=ids).logits
    torch.testing.assert_close(after[..., : before.shape[-1]], before)
    assert after.shape[-1] == before.shape[-1] + 2
    assert (after.argmax(-1) < before.shape[-1]).all()


def test_an_llms_own_template_is_kept_and_gets_its_media_in_place():
    model, tokenizer = tiny_llm(chatml=False)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    _, processor = build_model((model, tokenizer), *tiny_towers(), dtype=torch.float32)
    text = processor.apply_chat_template(ask("a", PICTURES[0], "b"), add_generation_prompt=True)
    assert text == "<|endoftext|>[user] a<image>b<|endoftext|>[assistant] "


def test_the_short_template_marks_ends_alone():
    model, tokenizer = tiny_llm()
    _, processor = build_model((model, tokenizer), *tiny_towers(), dtype=torch.float32, chat_template=NAMED["short"])
    chat = [{"role": "system", "content": "Be brief."}, *ask(PICTURES[0], "a?")]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text == processor.apply_chat_template(chat) == f"{tokenizer.bos_token or ''}Be brief.\n<image>a?\n"
    answered = processor.apply_chat_template([*chat, {"role": "assistant", "content": "b"}, *ask("c?")])
    assert answered == f"{text}b{tokenizer.eos_token}c?\n"


def test_folders_that_hold_no_model_are_told(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_model(tmp_path / "nothing")
    with pytest.raises(UserError, match="no model here"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="'llama' model"):
        load_model(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"stage": "align"}))
    with pytest.raises(UserError, match="run of 'align'"):
        load_model(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"stage": "tune"}))
    with pytest.raises(UserError, match="not finished"):
        load_model(tmp_path)
