"""Packed rows: every document's logits, loss and gradients are those it has alone."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_mm import tiny_llm, tiny_model, tiny_towers
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

from mmllm.blocks.documents import Documents, document_attention
from mmllm.data.conversations import IGNORE, collate, encode_conversation
from mmllm.data.packing import collate_packed
from mmllm.errors import UserError
from mmllm.model import build_model
from mmllm.model.packing import NAME, allow_packing, packed_call

RNG = np.random.default_rng(0)
PICTURES = [Image.fromarray(RNG.integers(0, 255, (40, 30, 3), np.uint8)) for _ in range(3)]
WAVE = RNG.standard_normal(8000).astype("f")


def turn(role, *parts):
    kinds = {str: lambda p: {"type": "text", "text": p}, np.ndarray: lambda p: {"type": "audio", "audio": p}}
    return {"role": role, "content": [kinds.get(type(p), lambda p: {"type": "image", "image": p})(p) for p in parts]}


def branch(question, answer):
    return [turn("user", question), turn("assistant", answer)]


RECORDS = [
    {"messages": [turn("user", PICTURES[0], "Is there a cat?"), turn("assistant", "yes")]},
    {"messages": [turn("user", "What is it?"), turn("assistant", "a dog, a bell.")]},
    {"messages": [turn("user", "a", PICTURES[1], "b", WAVE, PICTURES[2]), turn("assistant", "no")]},
]
BRANCHED = {
    "messages": [turn("user", PICTURES[1])],
    "branches": [branch("a cat?", "no"), branch("Where is the dog?", "a bell"), branch("a dog?", "yes")],
}


def batch_of(processor, rows, packed=True):
    batch = collate_packed(rows) if packed else collate(rows, processor.pad_id)
    media = [m for row in rows for m in row.media]
    pictures, sounds = ([x for k, x in media if k == kind] for kind in ("image", "audio"))
    return batch | processor.media_inputs(pictures, sounds)[0]


def without_labels(batch):
    return {k: v for k, v in batch.items() if k != "labels"}


@pytest.fixture(scope="module")
def parts():
    return tiny_model()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("records", [RECORDS, [*RECORDS, BRANCHED], [BRANCHED, RECORDS[0], BRANCHED]], ids=len)
def test_logits_of_packed_documents_are_those_of_each_alone(parts, records, training):
    model, processor = parts
    rows = [encode_conversation(r, processor) for r in records]
    with torch.set_grad_enabled(training):
        packed = model(**without_labels(batch_of(processor, rows))).logits[0]
        at = 0
        for row in rows:
            alone = model(**without_labels(batch_of(processor, [row], packed=False))).logits[0]
            torch.testing.assert_close(packed[at : at + len(alone)], alone, atol=1e-5, rtol=1e-5)
            at += len(alone)
    assert at == len(packed)


def test_changing_one_document_changes_no_bit_of_the_others(parts):
    model, processor = parts
    rows = [encode_conversation(r, processor) for r in RECORDS]
    batch = without_labels(batch_of(processor, rows))
    with torch.no_grad():
        before = model(**batch).logits[0]
        own = batch["document_ids"][0] == 1
        batch["input_ids"] = torch.where(own, batch["input_ids"].roll(1, 1), batch["input_ids"])
        after = model(**batch).logits[0]
    assert torch.equal(before[~own], after[~own]) and not torch.equal(before[own], after[own])


def test_loss_and_gradients_are_those_of_the_padded_batch():
    found = []
    for packed in (True, False):
        model, processor = tiny_model()
        model.train()
        rows = [encode_conversation(r, processor) for r in [*RECORDS, BRANCHED]]
        if packed:
            allow_packing(model.language_model)
            model.gradient_checkpointing_enable()
        loss = model(**batch_of(processor, rows, packed)).loss
        loss.backward()
        found.append((loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    assert found[0][1].keys() == found[1][1].keys()
    for name, g in found[0][1].items():
        torch.testing.assert_close(g, found[1][1][name], atol=2e-5, rtol=1e-3, msg=name)


def test_positions_restart_and_a_documents_first_token_is_not_predicted(parts):
    _, processor = parts
    rows = [encode_conversation(r, processor) for r in RECORDS]
    for row in rows:
        row.labels = list(row.input_ids)  # as in a document that is learned whole
    batch = collate_packed(rows)
    first = [0, *np.cumsum([len(r.input_ids) for r in rows])[:-1].tolist()]
    assert batch["position_ids"][0, first].tolist() == [0, 0, 0]
    assert batch["labels"][0, first].tolist() == [IGNORE] * 3 and int((batch["labels"] == IGNORE).sum()) == 3
    documents = Documents.of(batch["document_ids"][0])
    assert torch.equal(documents.positions(torch.device("cpu"))[None], batch["position_ids"])
    assert batch["attention_mask"].all() and "branch_ids" not in batch


def test_media_and_questions_stay_in_their_document():
    """With an injector and a connector that sees the question, too."""
    vision, _ = tiny_towers()
    textual = {"type": "qformer", "num_queries": 3, "hidden_dim": 16, "num_heads": 2, "text_dim": "auto"}
    injector = {"type": "gated_cross_attention", "every": 1, "num_heads": 4}
    model, processor = build_model(tiny_llm(), vision, None, {"vision": textual}, torch.float32, injector)
    for name, p in model.injector.named_parameters():
        if "gate" in name:
            torch.nn.init.constant_(p, 0.7)
    rows = [encode_conversation(r, processor) for r in (RECORDS[0], RECORDS[1], RECORDS[0])]
    with torch.no_grad():
        packed = model(**without_labels(batch_of(processor, rows))).logits[0]
        alone = [model(**without_labels(batch_of(processor, [row], packed=False))).logits[0] for row in rows]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)


SMALL = dict(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, initializer_range=0.2,
)  # fmt: skip


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
@pytest.mark.parametrize("training", [False, True])
def test_sliding_windows_and_soft_caps_are_kept(kind, training):
    torch.manual_seed(0)
    if kind == "mistral":
        llm = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4)).eval()
    else:
        llm = Gemma2ForCausalLM(
            Gemma2Config(**SMALL, sliding_window=4, attn_logit_softcapping=2.0, query_pre_attn_scalar=8)
        ).eval()
    llm.set_attn_implementation("eager")
    lengths = (9, 3, 14)
    ids = [torch.randint(0, 50, (1, n)) for n in lengths]
    with torch.set_grad_enabled(training):
        alone = torch.cat([llm(i).logits[0] for i in ids])
        numbers = torch.arange(3).repeat_interleave(torch.tensor(lengths))[None]
        extra = packed_call(llm, numbers, None, None)
        packed = llm(inputs_embeds=llm.get_input_embeddings()(torch.cat(ids, 1)), use_cache=False, **extra).logits[0]
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


def test_attention_is_sdpa_under_the_dense_mask():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 12, 8), torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8)
    ids = torch.tensor([0, 0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 2])
    branches = torch.tensor([0, 0, 1, 1, 2, 0, 0, 0, 1, 1, 2, 3])
    seen = (
        (ids[:, None] == ids) & ((branches[:, None] == branches) | (branches == 0)) & torch.ones(12, 12).tril().bool()
    )
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(document_attention(q, k, v, Documents.of(ids, branches)), want)
    q.requires_grad_(True)
    torch.testing.assert_close(document_attention(q, k, v, Documents.of(ids, branches)), want)


def test_a_model_that_can_pack_still_generates_as_before(parts):
    model, processor = tiny_model()
    chat = [turn("user", PICTURES[0], "Is there a cat?")]
    batch = processor.apply_chat_template([chat, [turn("user", "yes?")]], tokenize=True, add_generation_prompt=True)
    before = model.generate(**batch, max_new_tokens=4)
    allow_packing(model.language_model)
    assert model.language_model.config._attn_implementation == NAME
    assert torch.equal(model.generate(**batch, max_new_tokens=4), before)
    assert NAME not in str(model.config.to_dict())


def test_an_llm_that_mixes_tokens_otherwise_is_refused():
    llm, _ = tiny_llm()
    llm.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UserError, match="linear_attention"):
        allow_packing(llm)


@pytest.mark.slow
def test_smollm2_packed_equals_alone():
    from mmllm.data.models import resolve_model

    folder = resolve_model("starter:smollm2-135m-instruct")
    llm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    lengths = (40, 7, 130)
    ids = [torch.randint(0, 49000, (1, n)) for n in lengths]
    with torch.no_grad():
        alone = torch.cat([llm(i).logits[0] for i in ids])
        numbers = torch.arange(3).repeat_interleave(torch.tensor(lengths))[None]
        embeds = llm.get_input_embeddings()(torch.cat(ids, 1))
        packed = llm(inputs_embeds=embeds, use_cache=False, **packed_call(llm, numbers, None, None)).logits[0]
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)
