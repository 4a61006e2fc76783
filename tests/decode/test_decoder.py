"""The decoder on tiny real models: against transformers' generate, against full forwards, and against itself alone."""

import pytest
import torch
from tiny_llava import ask, picture, tiny_llama, tiny_llava

from mmllm.decode import Decoder, Request, parse_spec
from mmllm.decode.mix import log_probabilities
from mmllm.decode.prepare import captions
from mmllm.errors import UserError

QUESTIONS = ["Is there a cat?", "hi", "How many things are there?", "Where is the dog, and where is the cat?"]


@pytest.fixture(scope="module")
def llava():
    return tiny_llava()


@pytest.fixture
def decoder(llava):
    return Decoder(*llava)


def requests(**changes):
    """Eight requests: two pictures, four questions each, so that prefixes are shared and prompts are ragged."""
    return [Request(ask(q, picture(i)), max_new_tokens=6, **changes) for i in (1, 2) for q in QUESTIONS]


def reference_tokens(model, processor, request, **how):
    """What transformers' own generate says to one request alone, end token dropped."""
    given = inputs(processor, request.messages)
    out = model.generate(**given, max_new_tokens=request.max_new_tokens, **how)[0, given["input_ids"].shape[1] :]
    return [t for t in out.tolist() if t != processor.tokenizer.eos_token_id]


def inputs(processor, messages):
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )


def ids(results):
    return [r.token_ids for r in results]


def test_greedy_equals_generate(llava, decoder):
    model, processor = llava
    ours = ids(decoder.generate(requests()))
    for request, tokens in zip(requests(), ours):
        assert tokens == reference_tokens(model, processor, request, do_sample=False)


def test_text_only_model_and_sampling_equal_generate():
    model, tokenizer = tiny_llama()
    messages = [{"role": "user", "content": "hello"}]
    given = inputs(tokenizer, messages)
    for seed in range(3):
        torch.manual_seed(seed)
        reference = model.generate(**given, do_sample=True, temperature=0.7, top_k=20, max_new_tokens=8)
        request = Request(messages, "sample:temperature=0.7,top_k=20", max_new_tokens=8, seed=seed)
        ours = Decoder(model, tokenizer).generate([request])[0].token_ids
        assert ours == [t for t in reference[0, given["input_ids"].shape[1] :].tolist() if t != 2]


def test_vcd_without_contrast_is_greedy(decoder):
    assert ids(decoder.generate(requests(decode="vcd:alpha=0"))) == ids(decoder.generate(requests()))


def test_identical_views_are_the_base(decoder):
    base = ids(decoder.generate(requests()))
    assert ids(decoder.generate(requests(decode="ritual:transform=identity"))) == base


def test_a_mask_of_one_is_greedy_whatever_the_contrast(decoder):
    assert ids(decoder.generate(requests(decode="vcd:alpha=5,beta=1,step=999"))) == ids(decoder.generate(requests()))


def mixed_requests():
    methods = ["greedy", "vcd:step=800,beta=0", "ritual:transform=hflip", "sample:temperature=2", "ritual"]
    texts = [*QUESTIONS, "one more"]
    found = [
        Request(ask(q, picture(i)), m, max_new_tokens=3 + i, seed=i)
        for i, (q, m) in enumerate(zip(texts * 2, methods * 2))
    ]
    return [*found, Request(ask("no picture at all"), "vcd", max_new_tokens=5)]


@pytest.mark.parametrize("share", [True, False])
def test_a_mixed_batch_equals_each_request_alone(llava, share):
    decoder = Decoder(*llava, share_prefix=share)
    together = ids(decoder.generate(mixed_requests()))
    assert together == [ids(decoder.generate([request]))[0] for request in mixed_requests()]
    assert together[::-1] == ids(decoder.generate(mixed_requests()[::-1]))


def test_small_limits_change_nothing(llava):
    large = Decoder(*llava).generate(mixed_requests())
    small = Decoder(*llava, max_rows=3, token_budget=64).generate(mixed_requests())
    assert ids(large) == ids(small)


def test_noise_and_draws_follow_the_seed_only(decoder):
    def run(seed, method="vcd:alpha=4,step=999,beta=0"):
        return ids(decoder.generate(requests(decode=method, seed=seed)))

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(1, "sample") != run(2, "sample")


def reference_log_probability(model, processor, request, answer_ids, caption=None):
    """Full forwards without cache, tree or padding; views one by one."""
    encoder = Decoder(model, processor).encoder
    prompt = encoder.prompt(0, request, caption)
    views = []
    for number in prompt.view_row:
        row = prompt.rows[number]
        full = torch.tensor([[*row.ids, *answer_ids]])
        pixels = [t["pixel_values"] for t in encoder.tensors(row)]
        given = {"pixel_values": torch.cat(pixels)} if pixels else {}
        with torch.inference_mode():
            views.append(model(input_ids=full, **given).logits[0, len(row.ids) - 1 : -1])
    table = log_probabilities(torch.stack(views, dim=1), request.spec, list(range(len(answer_ids))))
    return sum(float(table[i, token]) for i, token in enumerate(answer_ids))


@pytest.mark.parametrize(
    "method",
    [
        "greedy", "vcd:beta=0", "vcd:beta=0.01,step=900", "ritual:transform=hflip,beta=0", "no_image:beta=0",
        "m3id:rate=1,beta=0", "vcd+ritual:transform=blur,normalize=true", "icd:where=prefix", "code", "patch_shuffle",
    ],
)  # fmt: skip
@pytest.mark.parametrize("share", [True, False])
def test_score_equals_full_forwards(llava, method, share):
    model, processor = llava
    asked = requests(decode=method, seed=3)
    candidates = [["yes", "no", "a dog", "a cat"][: 1 + i % 4] for i in range(len(asked))]
    ours = Decoder(model, processor, share_prefix=share).score(asked, candidates)
    if method == "code":
        described = captions(Decoder(model, processor), asked)
    for i, (request, texts, row) in enumerate(zip(asked, candidates, ours)):
        for text, value in zip(texts, row):
            tokens = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            caption = described[i] if method == "code" else None
            expected = reference_log_probability(model, processor, request, tokens, caption)
            assert value == pytest.approx(expected, abs=2e-3)


def test_score_with_the_end_token(llava):
    decoder = Decoder(*llava)
    request = requests()[0]
    with_end = decoder.score([request], [["yes"]], end=True)[0][0]
    eos = llava[1].tokenizer.eos_token_id
    tokens = [*llava[1].tokenizer("yes", add_special_tokens=False)["input_ids"], eos]
    assert with_end == pytest.approx(reference_log_probability(*llava, request, tokens), abs=2e-3)


def test_first_tokens_agree_with_scores(llava, decoder):
    """The one-token path of generate and the best-scored single token are the same decision."""
    letters = [chr(c) for c in range(33, 127)]
    for method in ("greedy", "vcd:step=900", "ritual"):
        asked = [Request(r.messages, method, max_new_tokens=1) for r in requests()]
        scored = decoder.score(asked, [letters] * len(asked))
        for result, row in zip(decoder.generate(asked), scored):
            if result.text in letters:
                assert letters[max(range(len(row)), key=row.__getitem__)] == result.text


def test_several_pictures_in_one_prompt(llava, decoder):
    model, processor = llava
    asked = [Request(ask(q, picture(1), picture(2), picture(3)), max_new_tokens=5) for q in QUESTIONS]
    for request, tokens in zip(asked, ids(decoder.generate(asked))):
        assert tokens == reference_tokens(model, processor, request, do_sample=False)


def test_the_picture_is_seen_once_per_view_and_question_set(llava, monkeypatch):
    """Four questions about two pictures: the vision tower sees two pictures, twice that with a second view."""
    model, processor = llava
    seen = []
    forward = model.model.vision_tower.forward
    monkeypatch.setattr(
        model.model.vision_tower, "forward", lambda x, *a, **k: (seen.append(len(x)), forward(x, *a, **k))[1]
    )
    for method, pictures in (("greedy", 2), ("vcd", 4)):
        seen.clear()
        Decoder(model, processor).score(requests(decode=method), [["yes", "no"]] * 8)
        assert sum(seen) == pictures


def test_second_token_depends_on_the_second_view(decoder):
    """A contrast that only reached the first token would give the base continuation after a forced first token."""
    asked = requests(decode="vcd:alpha=4,step=999,beta=0")
    base = decoder.score(requests(), [["ab"]] * 8)
    mixed = decoder.score(asked, [["ab"]] * 8)
    first = decoder.score(asked, [["a"]] * 8)
    base_first = decoder.score(requests(), [["a"]] * 8)
    second = [m[0] - f[0] for m, f in zip(mixed, first)]
    base_second = [m[0] - f[0] for m, f in zip(base, base_first)]
    assert any(abs(a - b) > 0.1 for a, b in zip(second, base_second))


def test_streamed_pieces_join_to_the_text(decoder):
    for method in ("sample:temperature=1.5", "vcd"):
        asked = [Request(r.messages, method, max_new_tokens=30, seed=i) for i, r in enumerate(requests())]
        pieces: list[tuple[int, str]] = []
        results = decoder.generate(asked, lambda *piece, to=pieces: to.append(piece))
        for i, result in enumerate(results):
            assert "".join(piece for k, piece in pieces if k == i) == result.text
        assert len(pieces) > 3 * len(asked)


def test_stop_strings_across_tokens():
    model, tokenizer = tiny_llama()
    decoder = Decoder(model, tokenizer)
    messages = [{"role": "user", "content": "hello"}]
    draws = [Request(messages, "sample:top_k=60", max_new_tokens=60, seed=s) for s in range(6)]
    checked = 0
    for request, free in zip(draws, decoder.generate(draws)):
        stop = free.text[4:7]
        if len(stop) < 3 or "\ufffd" in stop or free.text.find(stop) != 4:
            continue
        pieces: list[str] = []
        stopped = Request(messages, request.decode, 60, request.seed, stop=(stop,))
        cut = decoder.generate([stopped], lambda _, piece, to=pieces: to.append(piece))[0]
        assert cut.text == free.text[:4].rstrip() and cut.finish_reason == "stop"
        assert "".join(pieces) == cut.text
        checked += 1
    assert checked


def test_generation_ends_at_the_end_token():
    model, tokenizer = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
        model.lm_head.bias[tokenizer.eos_token_id] = 1e4
    result = Decoder(model, tokenizer).generate([Request([{"role": "user", "content": "x"}])])[0]
    assert (result.text, result.token_ids, result.finish_reason) == ("", [], "stop")


def test_an_unknown_medium_is_a_users_mistake(decoder):
    with pytest.raises(UserError, match="no audio"):
        decoder.generate([Request([{"role": "user", "content": [{"type": "audio", "audio": [0.0]}]}])])


def test_requests_read_their_method_at_once():
    assert Request([], "vcd").spec == parse_spec("vcd")
    with pytest.raises(UserError):
        Request([], "vdc")
