"""Conversations: answers alone are labelled, training tokens are inference tokens, branches never see each other."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_mm import tiny_model

from mmllm.data.conversations import (
    IGNORE,
    answer_weights,
    assemble,
    branch_mask,
    collate,
    encode_conversation,
    tokenise_conversation,
)
from mmllm.errors import UserError
from mmllm.model.chat_template import SHORT


@pytest.fixture(scope="module", params=[(True, None), (False, None), (True, SHORT)], ids=["chatml", "plain", "short"])
def parts(request):
    chatml, template = request.param
    return tiny_model(chatml=chatml, chat_template=template)


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), np.uint8))


def user(*content):
    return {"role": "user", "content": [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def image(seed=0):
    return {"type": "image", "image": picture(seed)}


def sound(seconds=1.0):
    return {"type": "audio", "audio": np.random.default_rng(3).standard_normal(int(16000 * seconds)).astype("f")}


BRANCHES = [
    [user("Is there a cat?"), assistant("yes")],
    [user("What is in the picture?"), assistant("a dog, a bell.")],
    [user("Where is it?"), assistant("<box>1,22,333,999</box>")],
]


def scene(branches=BRANCHES):
    return {"id": "s", "messages": [user(image())], "branches": branches}


def test_labels_are_exactly_the_answers_with_their_end_token(parts):
    _, processor = parts
    record = {"messages": [user("no"), assistant("a dog"), user("Is yes a dog?"), assistant("yes")]}
    row = encode_conversation(record, processor)
    eos = processor.tokenizer.eos_token
    labelled = [t for t in row.labels if t != IGNORE]
    assert processor.tokenizer.decode(labelled) == f"a dog{eos}yes{eos}"
    assert all(label in (IGNORE, token) for token, label in zip(row.input_ids, row.labels))
    assert row.labels[-1] != IGNORE, "nothing is computed after the last answer"


def test_the_training_row_is_what_generation_would_have_seen(parts):
    _, processor = parts
    question = [user(image(), "Is there a cat?", image(1), "yes?", sound())]
    row = encode_conversation({"messages": [*question, assistant("yes")]}, processor)
    prompt = processor.apply_chat_template(question, tokenize=True, add_generation_prompt=True)["input_ids"][0].tolist()
    assert row.input_ids[: len(prompt)] == prompt
    assert row.labels[: len(prompt)] == [IGNORE] * len(prompt)
    assert row.input_ids[len(prompt) :] == processor.text_ids("yes" + processor.tokenizer.eos_token)


def test_every_branch_is_the_prefix_continued_alone(parts):
    _, processor = parts
    row = encode_conversation(scene(), processor)
    for k, branch in enumerate(BRANCHES, start=1):
        alone = encode_conversation({"messages": [user(image(), *branch[0]["content"]), *branch[1:]]}, processor)
        keep = [i for i, b in enumerate(row.branch_ids) if b in (0, k)]
        assert [row.input_ids[i] for i in keep] == alone.input_ids
        assert [row.position_ids[i] for i in keep] == alone.position_ids == list(range(len(alone.input_ids)))
        assert [row.labels[i] for i in keep] == alone.labels
    assert len(row.media) == 1


def inputs_of(processor, rows):
    batch = collate(rows, processor.pad_id)
    media = [m for r in rows for m in r.media]
    data, _ = processor.media_inputs(
        [m for k, m in media if k == "image"], [processor.load_audio(m) for k, m in media if k == "audio"]
    )
    return {**batch, **data}


def test_branch_logits_equal_those_of_each_branch_alone(parts):
    model, processor = parts
    other = {"messages": [user(sound())], "branches": [[user("a cat?"), assistant("no")]]}
    rows = [encode_conversation(scene(), processor), encode_conversation(other, processor)]
    both = inputs_of(processor, rows)
    labels = both.pop("labels")
    with torch.no_grad():
        logits = model(**both).logits
    for k, branch in enumerate(BRANCHES, start=1):
        alone = encode_conversation(scene([branch]), processor)
        single = inputs_of(processor, [alone])
        single.pop("labels")
        assert "branch_ids" not in single, "one branch needs no mask of its own"
        with torch.no_grad():
            expected = model(**single).logits[0]
        keep = torch.tensor([i for i, b in enumerate(rows[0].branch_ids) if b in (0, k)])
        torch.testing.assert_close(logits[0, keep], expected, atol=1e-4, rtol=1e-4)
    assert labels.shape == logits.shape[:2]


def test_loss_is_the_mean_over_answer_tokens_of_the_full_logits(parts):
    model, processor = parts
    batch = inputs_of(
        processor, [encode_conversation(scene(), processor), encode_conversation(scene(BRANCHES[:1]), processor)]
    )
    labels = batch.pop("labels")
    with torch.no_grad():
        full = model(**batch).logits
        out = model(**batch, labels=labels)
    keep = labels[:, 1:] != IGNORE
    expected = torch.nn.functional.cross_entropy(full[:, :-1][keep], labels[:, 1:][keep])
    torch.testing.assert_close(out.loss, expected, atol=1e-5, rtol=1e-5)
    assert out.logits is None

def test_the_llm_does_not_compute_what_nothing_is_predicted_from(parts):
    model, processor = parts
    rows = [encode_conversation(scene(), processor), encode_conversation(scene(BRANCHES[:2]), processor)]
    batch = inputs_of(processor, rows)
    labels, seen = batch.pop("labels"), []
    weights = [p for p in model.language_model.parameters() if p.requires_grad]

    full = model(**batch).logits
    keep = labels[:, 1:] != IGNORE
    expected = torch.nn.functional.cross_entropy(full[:, :-1][keep], labels[:, 1:][keep])
    wanted = torch.autograd.grad(expected, weights, allow_unused=True)
    hook = model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    try:
        found = torch.autograd.grad(model(**batch, labels=labels).loss, weights, allow_unused=True)
    finally:
        hook.remove()
    assert seen == [len(rows[0].input_ids) - len(BRANCHES)]  # the end token of each answer is predicted, never read
    assert any(g is not None for g in wanted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_mask_is_additive_causal_and_lets_nobody_see_padding():
    ids = torch.tensor([[0, 0, 1, 1, 2, -1]])
    mask = branch_mask(ids, torch.float32)
    assert mask.shape == (1, 1, 6, 6) and mask.max() == 0
    seen = (mask[0, 0] == 0).int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]


def test_choosing_branches_and_length_limits(parts):
    _, processor = parts
    conversation = tokenise_conversation(scene(), processor)
    row = assemble(conversation, processor, choose=[2, 0])
    answers = processor.tokenizer.decode([t for t in row.labels if t != IGNORE])
    assert answers.startswith("<box>1,22,333,999</box>") and "yes" in answers and "bell" not in answers
    full = assemble(conversation, processor)
    short = assemble(conversation, processor, max_length=len(full.input_ids) - 1)
    assert max(short.branch_ids) == 2 and short.input_ids == full.input_ids[: len(short.input_ids)]
    with pytest.raises(UserError, match="no turn ends within 25 tokens"):
        assemble(conversation, processor, choose=[1], max_length=25)
    with pytest.raises(UserError, match="max_length"):
        long = tokenise_conversation({"messages": [user("hm", image()), assistant("yes")]}, processor)
        assemble(long, processor, max_length=10)


def test_a_long_conversation_is_cut_after_an_answer_and_loses_the_media_that_follow(parts):
    _, processor = parts
    turns = [user(image(0), "Is there a cat?"), assistant("yes"), user(sound(), image(1), "yes?"), assistant("a dog")]
    first, whole = ({"messages": turns[:n]} for n in (2, 4))
    alone, full = (encode_conversation(r, processor) for r in (first, whole))
    for length in (len(alone.input_ids), len(full.input_ids) - 1):
        cut = encode_conversation(whole, processor, max_length=length)
        assert cut.input_ids == alone.input_ids and cut.labels == alone.labels
        assert [m[0] for m in cut.media] == ["image"]
    assert encode_conversation(whole, processor, max_length=len(full.input_ids)).input_ids == full.input_ids
    with pytest.raises(UserError, match="no turn ends"):
        encode_conversation(whole, processor, max_length=len(alone.input_ids) - 1)


def document(*content):
    parts = [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]
    return {"id": "d", "messages": [{"role": "document", "content": parts}]}


def test_a_document_is_its_texts_with_media_in_place_and_no_template(parts):
    _, processor = parts
    tokenizer, text = processor.tokenizer, processor.text_ids
    row = encode_conversation(document("a cat ", image(0), "no dog <image>", image(1)), processor)
    pictures = [processor.image_token_id] * processor.image_seq_length
    first, second, end = text("a cat "), text("no dog < image>"), [tokenizer.eos_token_id]
    assert row.input_ids == [*first, *pictures, *second, *pictures, *end]
    none = [IGNORE] * len(pictures)
    assert row.labels == [*first, *none, *second, *none, *end]
    assert [m[0] for m in row.media] == ["image", "image"]
    long = len(row.input_ids) - 1
    assert encode_conversation(document("a cat ", image(0), "no dog <image>", image(1)), processor, max_length=long) \
        .input_ids == [*first, *pictures, *second]  # fmt: skip


def test_a_document_teaches_every_text_token_given_what_stands_before_it(parts):
    model, processor = parts
    batch = inputs_of(processor, [encode_conversation(document("a cat ", image(0), "no dog"), processor)])
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits[0].log_softmax(-1)
        loss = model(**batch, labels=labels).loss
    words = batch["input_ids"][0] != processor.image_token_id
    told = [-logits[i - 1, batch["input_ids"][0, i]] for i in range(1, len(words)) if words[i]]
    torch.testing.assert_close(loss, torch.stack(told).mean(), atol=1e-5, rtol=1e-5)


def test_a_document_stands_alone(parts):
    _, processor = parts
    messages = [*document("a")["messages"], assistant("yes")]
    with pytest.raises(UserError, match="alone"):
        encode_conversation({"messages": messages}, processor)


def test_bad_conversations_are_told_in_one_line(parts):
    _, processor = parts
    for record, word in [
        ({"id": "r7"}, "r7"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [user({"type": "vidio", "path": "x"}), assistant("a")]}, "vidio"),
        ({"messages": [user({"type": "image"}), assistant("a")]}, "path"),
    ]:
        with pytest.raises(UserError, match=word):
            tokenise_conversation(record, processor)


def test_answer_weights_by_hand():
    x = IGNORE
    labels = torch.tensor([[x, 5, 6, x, 7, x, 1, 2, 3, 4], [9, x, x, x, 8, 8, x, x, x, x]])
    assert torch.equal(answer_weights(labels, 0.0), (labels != x).float())
    whole = answer_weights(labels, 1.0)
    torch.testing.assert_close(whole[0], torch.tensor([0, 0.5, 0.5, 0, 1, 0, 0.25, 0.25, 0.25, 0.25]))
    torch.testing.assert_close(whole[1], torch.tensor([1.0, 0, 0, 0, 0.5, 0.5, 0, 0, 0, 0]))
    torch.testing.assert_close(answer_weights(labels, 0.5), whole.sqrt() * (labels != x))


@pytest.mark.parametrize("strange", [False, True])
def test_an_llm_that_changes_its_logits_in_its_own_way_still_gives_their_loss(parts, strange):
    model, processor = parts
    batch = inputs_of(processor, [encode_conversation(scene(), processor)])
    labels = batch.pop("labels")
    undo = None
    if strange:
        hook = lambda m, a, out: setattr(out, "logits", out.logits * 1.5 - 1)  # noqa: E731
        undo = model.language_model.register_forward_hook(hook)
    model._chunked_loss = None
    try:
        with torch.no_grad():
            full = model(**batch).logits
            losses = [model(**batch, labels=labels).loss for _ in range(2)]
        assert model._chunked_loss is not strange
    finally:
        model._chunked_loss = None
        if undo is not None:
            undo.remove()
    keep = labels[:, 1:] != IGNORE
    expected = torch.nn.functional.cross_entropy(full[:, :-1][keep], labels[:, 1:][keep])
    for loss in losses:
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
