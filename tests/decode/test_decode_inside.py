"""Methods that reach into the model: neutral where they must be, and equal to a plain restatement of their formula."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_llava import ask, picture, tiny_llama
from tiny_mm import tiny_model

from mmllm.decode import Decoder, Request
from mmllm.decode.attention import row_attention
from mmllm.decode.inside import Frame
from mmllm.decode.prepare import _run_dense, _seen_most
from mmllm.errors import UserError

LETTERS = [[chr(c) for c in range(33, 127)]] * 3
QUESTIONS = ["Is there a cat?", "hi", "How many things are there?"]


def asked(method):
    return [Request(ask(q, picture(i)), method, 5) for i, q in enumerate(QUESTIONS)]


def scored(decoder, method):
    return torch.tensor(decoder.score(asked(method), LETTERS))


def directions(tmp_path, scale=1.0):
    path = tmp_path / "directions.safetensors"
    save_file({"directions": torch.randn(2, 64, generator=torch.Generator().manual_seed(0)) * scale}, path)
    return path


NEUTRAL = ["pai:alpha=0,gamma=1,beta=0", "sid:keep=1,from_layer=1,beta=0", "avisc:deviations=-10,beta=0",
           "vista:scale=0,gamma=0", "dola:beta=1", "deco:alpha=0,top_k=1"]  # fmt: skip


@pytest.mark.parametrize("method", NEUTRAL)
def test_neutral_settings_give_greedy_answers(decoder, method):
    base = [r.token_ids for r in decoder.generate(asked("greedy"))]
    assert [r.token_ids for r in decoder.generate(asked(method))] == base


@pytest.mark.parametrize("method", [m for m in NEUTRAL if not m.startswith("d")])
def test_neutral_settings_give_the_base_scores(decoder, method):
    torch.testing.assert_close(scored(decoder, method), scored(decoder, "greedy"), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    "method",
    ["pai:alpha=2,layers=1:2,beta=0", "sid:keep=0.2,from_layer=1,beta=0", "avisc:deviations=0.3,beta=0",
     "vista:scale=0.5,gamma=0", "dola:layers=1,beta=0", "deco:layers=1", "vista:layers=1"],
)  # fmt: skip
def test_working_settings_change_scores_and_do_not_depend_on_the_batch(llava, method):
    decoder = Decoder(*llava)
    together = scored(decoder, method)
    assert (together - scored(decoder, "greedy")).abs().max() > 0.05
    for i, request in enumerate(asked(method)):
        alone = torch.tensor(decoder.score([request], LETTERS[:1])[0])
        torch.testing.assert_close(together[i], alone, atol=2e-3, rtol=0)
    answers = decoder.generate([*asked("greedy"), *asked(method), *asked("vcd")])
    assert [a.token_ids for a in answers[3:6]] == [decoder.generate([r])[0].token_ids for r in asked(method)]


@pytest.mark.parametrize("method", ["pai:layers=1:2", "sid:keep=0.3,from_layer=1", "vista:layers=1,scale=0.3", "dola"])
def test_the_first_token_is_the_best_scored_one(decoder, method):
    """The prefill for scores and the one for generation treat the predicting token alike."""
    for result, row in zip(decoder.generate(asked(method)), scored(decoder, method)):
        first = decoder.encoder.tokenizer.decode(result.token_ids[:1])
        if first in LETTERS[0]:
            assert LETTERS[0][int(row.argmax())] == first


@pytest.mark.parametrize(
    "method",
    ["pai:layers=1:2", "sid:keep=0.3,from_layer=1", "vti", "vista:scale=0.3,layers=1", "vcd:beta=0", "no_image:beta=0",
     "icd:beta=0", "m3id:rate=1,beta=0", "dola"],
)  # fmt: skip
def test_cached_steps_equal_full_forwards(decoder, method, tmp_path):
    """Token by token with a cache, or the whole answer scored at once: the same decision at every place.

    ``sid`` chooses its tokens anew at each step, so there only the first token has to agree.
    """
    if method == "vti":
        method = f"vti:scale=0.5,vectors={directions(tmp_path)}"
    request = asked(method)[2]
    steps = []
    result = decoder.generate([request], observer=lambda s: steps.append(s.scores.log_softmax(-1)))[0]
    tokens = [*result.token_ids, *([] if result.end_token_id is None else [result.end_token_id])]
    row = decoder.prompts([request])
    from mmllm.decode.rows import Ends

    parts = decoder._prefill(row, {id(r): [tokens] for r in row[0].rows}, use_cache=False)
    from mmllm.decode.mix import scores

    ends = Ends(decoder.inside, parts)
    z = ends.views(row[0], tokens)
    full = scores(z, [request.spec] * len(tokens), list(range(len(tokens))), ends.taps(row[0], tokens)).log_softmax(-1)
    for i in range(1 if method.startswith("sid") else len(tokens)):
        torch.testing.assert_close(steps[i], full[i], atol=2e-3, rtol=0)


def one_row(decoder, question="Is there a cat?"):
    row = decoder.encoder.prompt(0, Request(ask(question, picture(3)))).rows[0]
    return row, Frame([row], [row.media_places], [[len(row.ids) - 1]], [row.media_places])


def test_recorded_attention_is_the_models_own(llava, decoder):
    model, processor = llava
    row, frame = one_row(decoder)
    with row_attention(decoder.inside, frame, record=True) as read, torch.inference_mode():
        _run_dense(decoder, row)
    pixels = decoder.encoder.tensors(row)[0]["pixel_values"]
    model.set_attn_implementation("eager")
    try:
        out = model(input_ids=torch.tensor([row.ids]), pixel_values=pixels, output_attentions=True)
    finally:
        model.set_attn_implementation("sdpa")
    for ours, theirs in zip(read.mass[0], out.attentions):
        torch.testing.assert_close(ours, theirs[0, :, -1, row.media_places].mean(0), atol=1e-5, rtol=0)


def test_blind_tokens_by_hand(decoder):
    row, frame = one_row(decoder)
    with row_attention(decoder.inside, frame, record=True) as read, torch.inference_mode():
        _run_dense(decoder, row)
    from mmllm.decode.ops import op

    kept = _seen_most(decoder, row, op("blind", gamma=1.0, deviations=0.5))
    mean = torch.stack(read.mass[0]).mean(0)
    assert torch.equal(kept, mean >= mean.mean() + 0.5 * mean.std(correction=0))
    assert 0 < int(kept.sum()) < len(kept)


def test_steering_keeps_lengths_and_turns_towards_the_direction(tmp_path):
    model, tokenizer = tiny_llama()
    decoder = Decoder(model, tokenizer)
    method = f"vti:scale=0.7,vectors={directions(tmp_path)}"
    (prompt,) = decoder.prompts([Request([{"role": "user", "content": "hello"}], method)])
    row = prompt.rows[0]
    x = torch.randn(1, 5, 64)
    mlp = decoder.inside.layers[0].mlp
    plain = mlp(x)
    with decoder.inside.changed(Frame([row], [[]], [[4]])):
        turned = mlp(x)
    torch.testing.assert_close(turned.norm(dim=-1), plain.norm(dim=-1))
    expected = F.normalize(F.normalize(plain, dim=-1) + 0.7 * F.normalize(row.directions[0], dim=-1), dim=-1)
    torch.testing.assert_close(turned, expected * plain.norm(dim=-1, keepdim=True))
    still = decoder.score(
        [Request([{"role": "user", "content": "hello"}], f"{method}".replace("0.7", "0"))], LETTERS[:1]
    )
    base = decoder.score([Request([{"role": "user", "content": "hello"}])], LETTERS[:1])
    torch.testing.assert_close(torch.tensor(still), torch.tensor(base), atol=1e-3, rtol=0)


def test_directions_that_do_not_fit_are_a_users_mistake(decoder, tmp_path):
    save_file({"directions": torch.zeros(7, 64)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"\[2, width\]"):
        decoder.generate(asked(f"vti:vectors={tmp_path / 'x.safetensors'}"))
    with pytest.raises(UserError, match="no file"):
        decoder.generate(asked("vti"))


def test_our_own_model_has_the_same_inside():
    model, processor = tiny_model()
    from PIL import Image

    image = Image.new("RGB", (40, 30), "red")
    requests = [
        Request(ask("what?", image), m, 3)
        for m in ("dola", "pai", "sid:from_layer=1", "avisc", "vista:layers=1", "deco:layers=1")
    ]
    together = Decoder(model, processor).generate(requests)
    assert [r.token_ids for r in together] == [Decoder(model, processor).generate([r])[0].token_ids for r in requests]


def test_text_only_prompts_leave_media_methods_neutral():
    model, tokenizer = tiny_llama()
    messages = [{"role": "user", "content": "hello"}]
    methods = ["greedy", "vcd", "no_image", "pai:beta=0", "sid", "avisc", "code", "m3id"]
    answers = Decoder(model, tokenizer).generate([Request(messages, m, 6) for m in methods])
    assert all(a.token_ids == answers[0].token_ids and a.rows_per_token == 1 for a in answers)
