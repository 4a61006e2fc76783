"""Media through layers inside the LLM, and connectors that see the question: neutral, saved, the same however run."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_mm import tiny_llm, tiny_towers

from mmllm.contracts import Features
from mmllm.data.conversations import collate, encode_conversation
from mmllm.errors import UserError
from mmllm.model import build_model, load_model
from mmllm.model.injection import media_of_rows
from mmllm.model.loading import add_injector
from mmllm.model.places import Placed, words_around

RNG = np.random.default_rng(0)
PICTURES = [Image.fromarray(RNG.integers(0, 255, (40, 30, 3), np.uint8)) for _ in range(3)]
WAVE = RNG.standard_normal(8000).astype("f")
PERCEIVER = {"type": "perceiver", "num_latents": 3, "hidden_dim": 16, "num_heads": 2}
TEXTUAL = {"type": "qformer", "num_queries": 3, "hidden_dim": 16, "num_heads": 2, "text_dim": "auto"}
GATED = {"type": "gated_cross_attention", "every": 1, "num_heads": 4}


def part(media):
    if isinstance(media, str):
        return {"type": "text", "text": media}
    return {"type": "image", "image": media} if isinstance(media, Image.Image) else {"type": "audio", "audio": media}


def ask(*content):
    return [{"role": "user", "content": [part(c) for c in content]}]


CHATS = [
    ask("Is there a cat?"),
    ask(PICTURES[0], "What is in the picture?"),
    ask(WAVE, "yes?"),
    ask("yes", PICTURES[1], "and", WAVE, "and", PICTURES[2]),
]


def prepare(processor, chats):
    return processor.apply_chat_template(chats, tokenize=True, add_generation_prompt=True)


def build(connector=PERCEIVER, injector=None, opened=0.0):
    vision, audio = tiny_towers()
    torch.manual_seed(1)
    connectors = {"vision": connector, "audio": {"type": "avg_pool", "stride": 4}}
    model, processor = build_model(tiny_llm(), vision, audio, connectors, torch.float32, injector)
    if model.injector is not None:
        for name, p in model.injector.named_parameters():
            if "gate" in name:
                torch.nn.init.constant_(p, opened)
    return model, processor


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_injector_leaves_the_logits_bit_equal(in_place, dtype):
    model, processor = build()
    model.language_model.to(dtype)
    if in_place:
        before = model(**prepare(processor, CHATS[3])).logits
    else:  # one placeholder a medium: the LLM by itself on these tokens
        add_injector(model, processor, GATED)
        ids = prepare(processor, CHATS[3])["input_ids"]
        assert int((ids == processor.image_token_id).sum()) == 2 and int((ids == processor.audio_token_id).sum()) == 1
        before = model.language_model(input_ids=ids).logits
    if in_place:
        add_injector(model, processor, {**GATED, "in_place": True})
    batch = prepare(processor, CHATS[3])
    assert torch.equal(model(**batch).logits, before)
    for name, p in model.injector.named_parameters():
        if "gate" in name:
            torch.nn.init.constant_(p, 1.0)
    assert not torch.equal(model(**batch).logits, before), "opened gates let the media in"
    with pytest.raises(UserError, match="already"):
        add_injector(model, processor, GATED)


@pytest.mark.parametrize("settings", [{}, {"in_place": True}, {"attend": "all"}], ids=str)
def test_a_padded_mixed_batch_generates_what_each_request_generates_alone(settings):
    model, processor = build(injector={**GATED, **settings}, opened=0.7)
    batch = prepare(processor, CHATS)
    together = model.generate(**batch, max_new_tokens=6)[:, batch["input_ids"].shape[1] :]
    slow = dict(prepare(processor, CHATS[3]))
    for row, chat in zip(together, CHATS):
        single = prepare(processor, chat)
        alone = model.generate(**single, max_new_tokens=6)[0, single["input_ids"].shape[1] :]
        assert row[: len(alone)].tolist() == alone.tolist()
    single = prepare(processor, CHATS[1])
    beams = [model.generate(**single, max_new_tokens=4, num_beams=2, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*beams), "beams take their media along"
    for step in range(4):  # with a cache as without
        with torch.no_grad():
            token = int(model(**slow, use_cache=False).logits[0, -1].argmax())
        assert token == together[3, step]
        slow["input_ids"] = torch.cat([slow["input_ids"], torch.tensor([[token]])], 1)
        slow["attention_mask"] = torch.ones_like(slow["input_ids"])


def test_saved_and_loaded_with_the_model_and_used_by_our_own_decoder(tmp_path):
    from mmllm.decode import Decoder, Request

    model, processor = build(TEXTUAL, GATED, opened=0.5)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, again_processor = load_model(tmp_path, torch.float32)
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b), name
    assert any(name.startswith("injector.") for name in model.state_dict())
    batch = prepare(again_processor, CHATS)
    assert torch.equal(again(**batch).logits, model(**prepare(processor, CHATS)).logits)
    start = batch["input_ids"].shape[1]
    expected = again.generate(**batch, max_new_tokens=5)[:, start:].tolist()
    ends = set(again.generation_config.eos_token_id)
    answers = Decoder(again, again_processor).generate([Request(c, "greedy", max_new_tokens=5) for c in CHATS])
    for answer, row in zip(answers, expected):
        row = row[: next((i for i, t in enumerate(row) if t in ends), len(row))]
        assert answer.token_ids == row


def test_training_reaches_every_parameter_and_checkpointing_changes_nothing():
    model, processor = build(injector=GATED, opened=0.5)
    model.requires_grad_(False)
    for p in model.injector.parameters():
        p.requires_grad_(True)
    batch = prepare(processor, CHATS)
    labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    grads = []
    for checkpointing in (False, True):
        model.train()
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batch, labels=labels).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.injector.named_parameters()})
        assert all(g.abs().sum() > 0 for n, g in grads[-1].items() if not n.endswith(".k.bias")), "softmax: no k.bias"
    for name, g in grads[0].items():
        torch.testing.assert_close(g, grads[1][name], atol=1e-6, rtol=1e-4)


def test_without_a_labelled_token_the_loss_is_a_zero_that_reaches_all_that_trains():
    """With several processes nobody may wait for a gradient that does not come."""
    model, processor = build(injector=GATED, opened=0.5)
    batch = prepare(processor, CHATS[3])
    loss = model(**batch, labels=torch.full_like(batch["input_ids"], -100)).loss
    loss.backward()
    assert float(loss.detach()) == 0
    for part in (model.injector, model.vision_connector, model.audio_connector, model.language_model):
        assert all(p.grad is not None and not p.grad.any() for p in part.parameters())


def test_a_token_sees_the_last_medium_before_it_in_its_own_segment():
    tokens = torch.arange(1.0, 4.0)[:, None, None].expand(3, 2, 4)
    mask = torch.tensor([[1, 1], [1, 0], [1, 1]]).bool()
    placed = Placed(tokens, mask, torch.tensor([0, 0, 1]), torch.tensor([1, 3, 0]))

    def seen(attend="last", **segments):
        media = media_of_rows([placed], (2, 5), attend, **segments)
        return [[sorted({int(x) for x in media.tokens[b, media.allowed[b, i], 0]}) for i in range(5)] for b in (0, 1)]

    assert seen() == [[[], [1], [1], [2], [2]], [[3]] * 5]
    assert seen("all") == [[[], [1], [1], [1, 2], [1, 2]], [[3]] * 5]
    ids = torch.tensor([[0, 0, 1, 2, 2], [0, 0, 0, 1, 1]])
    assert seen(document_ids=ids) == [[[], [1], [], [2], [2]], [[3], [3], [3], [], []]]
    assert seen("all", branch_ids=ids) == [[[], [1], [1], [1, 2], [1, 2]], [[3]] * 5]
    assert media_of_rows([placed], (2, 5), "last").allowed[0, 4].sum() == 1, "nobody sees padding of a medium"
    assert media_of_rows([], (2, 5), "last") is None


# ---- a connector that sees the question ------------------------------------------------------------------------------


def test_words_around_a_medium_are_those_of_its_turn():
    ids = torch.tensor([[9, 1, 7, 2, 9, 3, 8, 8, 9, 7, 4]])  # 9 parts turns, 7 and 8 are media
    embeds = ids[..., None].float()
    text = words_around(ids, embeds, torch.tensor([0, 0, 0]), torch.tensor([2, 6, 9]), [9], [7, 8])
    assert [t[m].flatten().tolist() for t, m in zip(text.tokens, text.mask)] == [[1, 2], [3], [4]]
    documents = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2]])
    apart = words_around(ids, embeds, torch.tensor([0]), torch.tensor([9]), [9], [7, 8], documents)
    assert not apart.mask.any() and isinstance(apart, Features)


def test_the_question_reaches_the_connector_and_answers_do_not():
    model, processor = build(TEXTUAL)
    tokens = []
    for chat in (ask(PICTURES[0], "Is there a cat?"), ask(PICTURES[0], "Where is it?")):
        batch = prepare(processor, chat)
        media = {k: v for k, v in batch.items() if k != "attention_mask"}
        tokens.append(model.embed_with_media(**media)[1][0].tokens)
    assert not torch.allclose(tokens[0], tokens[1], atol=1e-4)
    chat = [*ask(PICTURES[0], "Is there a cat?"), {"role": "assistant", "content": "a dog"}, *ask("Where?")]
    longer = processor.apply_chat_template(chat, tokenize=True)
    media = {k: v for k, v in longer.items() if k != "attention_mask"}
    torch.testing.assert_close(model.embed_with_media(**media)[1][0].tokens, tokens[0])


def test_a_connector_that_sees_the_question_refuses_what_it_cannot_do():
    model, processor = build(TEXTUAL)
    branches = [[*ask(q), {"role": "assistant", "content": "no"}] for q in ("a cat?", "a dog?")]
    record = {"messages": ask(PICTURES[0]), "branches": branches}
    row = encode_conversation(record, processor)
    batch = collate([row], processor.pad_id) | processor.media_inputs([PICTURES[0]], [])[0]
    with pytest.raises(UserError, match="branches_per_row"):
        model(**batch)
    vision, _ = tiny_towers()
    with pytest.raises(UserError, match="chat template"):
        build_model(tiny_llm(chatml=False), vision, None, {"vision": TEXTUAL}, torch.float32)


@pytest.mark.parametrize(
    "settings, word",
    [({"every": 3}, "every"), ({"num_heads": 5}, "num_heads"), ({"attend": "some"}, "attend"), ({"evry": 1}, "every")],
)
def test_mistakes_are_told_in_one_line(settings, word):
    with pytest.raises(UserError, match=word) as e:
        build(injector={**GATED, **settings})
    assert "\n" not in str(e.value)
