"""The engine's own promises: shared rows, forwards counted, caches apart, processors, criteria, several answers."""

import pytest
import torch
from tiny_llava import ask, picture, tiny_llama
from transformers import NoRepeatNGramLogitsProcessor, StopStringCriteria

from mmllm.decode import Decoder, Request
from mmllm.decode.prefill import build_trees, prefill
from mmllm.decode.rows import gathered

CHAT = [{"role": "user", "content": "hello"}]
SYSTEM = {"role": "system", "content": "You are a careful observer of pictures."}


def tokens(results):
    return [r.token_ids for r in results]


def test_forwards_are_prefills_and_steps_whatever_the_number_of_views(llava):
    counts = {}
    for method in ("greedy", "vcd:beta=1", "vcd:beta=1+blank:beta=1+no_image:beta=1"):
        decoder = Decoder(*llava, token_budget=100_000)
        result = decoder.generate([Request(ask("hi", picture(1)), method, max_new_tokens=6, min_new_tokens=6)])[0]
        assert len(result.token_ids) == 6
        counts[method] = decoder.forwards
    assert set(counts.values()) == {6}  # one prefill, which gives the first token, and five steps


def test_requests_of_many_methods_share_their_common_rows(decoder):
    methods = ["greedy", "vcd", "vcd:alpha=3", "vcd+blank", "blank", "apc", "ritual:transform=hflip"]
    prompts = decoder.prompts([Request(ask("hi", picture(1)), m) for m in methods])
    rows = [row for p in prompts for row in p.rows]
    trees = build_trees(rows, {}, share=True)
    assert len(rows) == 13 and len(trees) == 4  # untouched, noised, blank, mirrored


def test_caches_of_views_are_distinct_and_as_long_as_their_prompts(decoder):
    prompts = decoder.prompts([Request(ask(q, picture(1)), m) for q, m in (("hi", "vcd"), ("how many?", "no_image"))])
    rows = [row for p in prompts for row in p.rows]
    part = prefill(decoder.model, decoder.encoder, decoder.inside, build_trees(rows, {}, True), True)
    state = gathered(decoder.inside, prompts, [part])
    assert state.mask.sum(1).tolist() == [len(row.ids) for row in rows]
    keys = state.cache.layers[1].keys
    assert len(keys) == len(rows) == 4
    last = keys[:, :, -1]
    assert all(not torch.allclose(last[i], last[j]) for i in range(4) for j in range(i))


def test_a_long_system_prompt_is_computed_once(llava, monkeypatch):
    asked = [
        Request([SYSTEM, *ask(q, picture(i))], m, 5) for i in (1, 2) for q in ("hi", "a?") for m in ("vcd", "code")
    ]
    shared, alone = Decoder(*llava), Decoder(*llava, share_prefix=False)
    assert tokens(shared.generate(asked)) == [alone.generate([r])[0].token_ids for r in asked]
    answers = [["yes", "no", "a cat"]] * len(asked)
    for a, b in zip(shared.score(asked, answers), alone.score(asked, answers)):
        assert a == pytest.approx(b, abs=2e-3)
    prompts = shared.prompts([Request([SYSTEM, *ask("hi", picture(i))]) for i in (1, 2, 3)])
    part = prefill(
        shared.model, shared.encoder, shared.inside, build_trees([p.rows[0] for p in prompts], {}, True), False
    )
    assert part.lead == prompts[0].rows[0].media_places[0] > 16


def test_several_answers_are_draws_of_neighbouring_seeds(decoder):
    def one(seed, n=1):
        request = Request(ask("hi", picture(1)), "sample:temperature=3", 8, seed=seed, n=n)
        return decoder.generate([Request(ask("x", picture(2)), "vcd", 4), request])[1]

    result = one(7, n=3)
    assert len(result.alternatives) == 2
    assert [result.token_ids, *tokens(result.alternatives)] == [one(7 + i).token_ids for i in range(3)]


def test_processors_and_criteria_of_transformers_hold():
    model, tokenizer = tiny_llama()
    decoder = Decoder(model, tokenizer)
    free = decoder.generate([Request(CHAT, max_new_tokens=40)])[0]
    held = decoder.generate([Request(CHAT, max_new_tokens=40, logits_processor=[NoRepeatNGramLogitsProcessor(1)])])[0]
    assert len(set(free.token_ids)) < len(free.token_ids) == 40
    assert len(set(held.token_ids)) == len(held.token_ids)
    given = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        reference = model.generate(**given, do_sample=False, max_new_tokens=40, no_repeat_ngram_size=1)
    assert held.token_ids == [t for t in reference[0, given["input_ids"].shape[1] :].tolist() if t != 2]
    word = free.text[3:5]
    criterion = StopStringCriteria(tokenizer, [word])
    cut = decoder.generate([Request(CHAT, max_new_tokens=40, stopping_criteria=[criterion])])[0]
    assert cut.finish_reason == "stop" and cut.token_ids == free.token_ids[: len(cut.token_ids)]
    assert len(cut.token_ids) < 40


def test_end_tokens_wait_for_the_minimum_and_may_be_several():
    model, tokenizer = tiny_llama()
    decoder = Decoder(model, tokenizer)
    free = decoder.generate([Request(CHAT, max_new_tokens=20)])[0]
    third = free.token_ids[2]
    early = free.token_ids.index(third)
    ended = decoder.generate([Request(CHAT, max_new_tokens=20, eos_token_id=(third, 300))])[0]
    assert (ended.end_token_id, ended.token_ids) == (third, free.token_ids[:early])
    later = decoder.generate([Request(CHAT, max_new_tokens=20, eos_token_id=(third,), min_new_tokens=9)])[0]
    assert len(later.token_ids) >= 9 and third not in later.token_ids[:9]


def test_the_observer_sees_every_token_and_changes_none(decoder):
    asked = [Request(ask("hi", picture(1)), m, 6, seed=2) for m in ("greedy", "vcd", "sample:temperature=2")]
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    watched = decoder.generate(asked, observer=lambda s: seen[s.index].append(s.token))
    assert tokens(watched) == tokens(decoder.generate(asked))
    assert [seen[i][: len(r.token_ids)] for i, r in enumerate(watched)] == tokens(watched)


def test_noise_belongs_to_the_view_not_to_its_neighbours(decoder):
    """The same noised picture whatever else a method looks at; another seed is another noise."""

    def row(method, seed, view):
        (prompt,) = decoder.prompts([Request(ask("hi", picture(1)), method, seed=seed)])
        return decoder.encoder.tensors(prompt.rows[view])[0]["pixel_values"]

    assert torch.equal(row("vcd", 1, 1), row("blank+vcd", 1, 2))
    assert not torch.equal(row("vcd", 1, 1), row("vcd", 2, 1))
    assert not torch.equal(row("vcd:step=500", 1, 1), row("vcd:step=501", 1, 1))


def test_dropping_the_media_removes_exactly_their_tokens(decoder):
    (prompt,) = decoder.prompts([Request(ask("hi", picture(1), picture(2)), "no_image")])
    whole, bare = prompt.rows
    special = decoder.encoder.placeholder_ids["image"]
    assert bare.ids == [token for token in whole.ids if token != special] and not bare.shown
    assert len(whole.ids) - len(bare.ids) == len(whole.media_places) == 32


def test_views_that_come_out_alike_are_the_base(decoder, tmp_path):
    """Another picture that is the same one, and a disturbing system prompt that stands there already."""
    picture(1).save(tmp_path / "a.png")
    shown = [{"type": "image", "path": str(tmp_path / "a.png")}, {"type": "text", "text": "hi"}]
    messages = [SYSTEM, {"role": "user", "content": shown}]
    other = {
        "views": [{"media": [{"name": "other", "path": str(tmp_path / "a.png")}]}],
        "mix": [{"view": 1, "weight": 3}],
    }
    same = f'icd:text="{SYSTEM["content"]}",alpha=3'
    base, *changed = decoder.generate([Request(messages, d, 6) for d in ("greedy", other, same)])
    assert all(r.token_ids == base.token_ids and r.rows_per_token == 1 for r in changed)
