"""What keeps the LLM's mind: replay, the divergence from its base, and its perplexity before and after."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from PIL import Image
from test_tune import config, moved, own_cache, tune, turn, weights, world  # noqa: F401
from tiny_mm import tiny_llm, tiny_towers

from mmllm.data.conversations import IGNORE, collate, encode_conversation
from mmllm.data.packing import collate_packed
from mmllm.errors import UserError
from mmllm.model import build_model
from mmllm.model.fast_lora import fuse_lora
from mmllm.train.kl_to_base import KLToBase, kl_sum, text_only
from mmllm.train.perplexity import perplexity, read_texts
from mmllm.train.replay import mix_replay

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
RECORDS = [
    {"messages": [turn("user", "Is it a dog?"), turn("assistant", "yes, a dog")]},
    {"messages": [turn("user", {"type": "image", "image": PICTURE}, "What?"), turn("assistant", "a bell")]},
    {
        "messages": [turn("user", "cat")],
        "branches": [[turn("user", f"{k}?"), turn("assistant", "no" * k)] for k in (1, 2)],
    },
]


@pytest.fixture(scope="module")
def parts():
    """A model with adapters away from zero."""
    vision, _ = tiny_towers()
    model, processor = build_model(
        tiny_llm(), vision_tower=vision, connectors={"vision": {"type": "mlp"}}, dtype=torch.float32
    )
    settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model.language_model = get_peft_model(model.language_model, settings)
    fuse_lora(model.language_model)
    made = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.language_model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3, generator=made)
    return model, processor


def reference(model, processor):
    """The same sum from whole logits, conversation by conversation, branch by branch."""
    total, count = 0.0, 0
    for record in (RECORDS[0], *({**RECORDS[2], "branches": [b]} for b in RECORDS[2]["branches"])):
        row = collate([encode_conversation(record, processor)], processor.pad_id)
        ids, asked = row["input_ids"], row["labels"][:, 1:] != IGNORE
        with torch.no_grad():
            tuned = model.language_model(ids).logits[:, :-1][asked].log_softmax(-1)
            with model.language_model.disable_adapter():
                base = model.language_model(ids).logits[:, :-1][asked].log_softmax(-1)
        total += float((tuned.exp() * (tuned - base)).sum())
        count += len(tuned)
    return total, count


@pytest.mark.parametrize("packed", [False, True])
def test_the_divergence_is_that_of_whole_logits_on_text_alone(parts, packed):
    model, processor = parts
    rows = [encode_conversation(r, processor) for r in RECORDS]
    batch = collate_packed(rows) if packed else collate(rows, processor.pad_id)
    chosen = text_only(batch, [processor.image_token_id, processor.audio_token_id])
    wanted, count = reference(model, processor)
    assert int((chosen["labels"][:, 1:] != IGNORE).sum()) == count
    before = [p.requires_grad for p in model.parameters()]
    found = kl_sum(model, chosen)
    torch.testing.assert_close(float(found.detach()), wanted, rtol=1e-4, atol=1e-5)
    assert wanted > 0.1 and before == [p.requires_grad for p in model.parameters()]
    found.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert any("lora_A" in n and g.abs().sum() > 0 for n, g in grads.items())
    model.zero_grad()


def test_batches_with_media_alone_are_passed_over(parts):
    model, processor = parts
    batch = collate([encode_conversation(RECORDS[1], processor)], processor.pad_id)
    hook = KLToBase(model, 1.0, [processor.image_token_id])
    losses = {"loss": torch.tensor(2.0)}
    hook.after_loss(model, {**batch, "num_items": 3}, losses, 0)
    assert float(losses["loss"]) == 2 and float(losses["kl_to_base"]) == 0


def test_weighted_tokens_count_by_their_weight(parts):
    model, processor = parts
    batch = collate([encode_conversation(RECORDS[0], processor)], processor.pad_id)
    plain = kl_sum(model, batch)
    half = kl_sum(model, {**batch, "label_weights": torch.full_like(batch["labels"], 0.5, dtype=torch.float32)})
    torch.testing.assert_close(half, plain / 2)


def text_records(n):
    return [
        {"id": f"t{i}", "messages": [turn("user", f"Say {i}"), turn("assistant", "a dog" * (i + 1))]} for i in range(n)
    ]


@pytest.fixture(scope="module")
def replay(world):  # noqa: F811
    (world / "text.jsonl").write_text("".join(json.dumps(r) + "\n" for r in text_records(5)))
    return "text.jsonl"


def test_a_run_with_replay_and_divergence_measures_its_llm(world, replay, tmp_path, capsys):  # noqa: F811
    common = dict(replay={"data": replay, "weight": 0.5}, lora={"r": 4, "alpha": 64})
    train = {"llm": "lora", "connector": "none", "max_steps": 12, "learning_rate": 1e-2}
    ended = {}
    for weight in (0.001, 30.0):
        run = tune("tune", config(world, kl_to_base=weight, train=train, **common), tmp_path / str(weight))
        rows = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
        added = [r["kl_to_base"] for r in rows if "kl_to_base" in r]
        assert len(added) == 12 and abs(added[0]) < 1e-4  # adapters begin at zero
        ended[weight] = np.mean([k for k in added[6:] if k > 0]) / weight  # some batches have pictures alone
        found = json.loads((run / "run.json").read_text())["perplexity"]
        texts = read_texts("built-in")
        model, processor = build_model(tiny_llm(), dtype=torch.float32)  # with the words for media
        wanted = whole_perplexity(model.language_model, processor.tokenizer, texts)
        assert found["before"] == pytest.approx(wanted, rel=1e-4)
        assert found["after"] != found["before"] and found["tokens"] > 500
        assert f"{found['after']:.2f} after" in capsys.readouterr().out
        listed = json.loads((run / "final" / "results.json").read_text())["figures"]
        assert {f["name"]: f["value"] for f in listed}["llm_perplexity_after"] == found["after"]
    assert ended[30.0] < 0.3 * ended[0.001]
    from mmllm.report.runs import write_run_report

    assert "llm_perplexity_before" in write_run_report([run], tmp_path / "page.html").read_text()


def test_a_run_that_keeps_resumes_with_the_same_bits(world, replay, tmp_path):  # noqa: F811
    settings = config(
        world,
        kl_to_base=1.0,
        replay={"data": replay, "weight": 0.5},
        lora={"r": 2, "dropout": 0.1},
        train={"llm": "lora", "connector": "none", "max_steps": 4, "learning_rate": 1e-2},
    )
    whole = tune("tune", settings, tmp_path / "whole")
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "final")
    shutil.rmtree(cut / "checkpoints" / "checkpoint-4")
    tune("tune", settings, cut, resume=True)
    assert moved(weights(whole), weights(cut)) == set()
    one, other = (json.loads((run / "run.json").read_text())["perplexity"] for run in (whole, cut))
    assert one == other


def whole_perplexity(model, tokenizer, texts):
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"][:512]])
        with torch.no_grad():
            logits = model(ids).logits
        total += float(F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return float(np.exp(total / count))


def test_perplexity_of_an_llm_that_knows_nothing_is_its_vocabulary(parts):
    llm, tokenizer = tiny_llm(tie=False)
    model, processor = build_model((llm, tokenizer), dtype=torch.float32)
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    model.train()
    value, count = perplexity(model, processor.tokenizer, ["yes no yes", "a", "dog cat"])
    assert value == pytest.approx(len(processor.tokenizer), rel=1e-5) and count > 3 and model.training


def test_an_llm_that_does_not_train_is_not_measured(world, tmp_path):  # noqa: F811
    run = tune("pretrain", config(world, train={"max_steps": 1}), tmp_path / "run")
    assert "perplexity" not in json.loads((run / "run.json").read_text())


def test_texts_come_from_files_of_two_kinds(tmp_path):
    (tmp_path / "a.txt").write_text("one\nline\n\ntwo\n\n\n")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two\\nlines"}\n')
    (tmp_path / "c.jsonl").write_text('{"txt": "one"}\n')
    (tmp_path / "d.txt").write_text("\n\n")
    assert read_texts("a.txt", tmp_path) == ["one\nline", "two"]
    assert read_texts("b.jsonl", tmp_path) == ["one", "two\nlines"]
    for name in ("c.jsonl", "d.txt", "none.txt"):
        with pytest.raises(UserError, match=name):
            read_texts(name, tmp_path)


def test_replay_has_its_share_and_draws_evenly():
    main = [{"id": str(i), "messages": [turn("user", "x")]} for i in range(30)]
    few, many = text_records(4), text_records(50)
    mixed = mix_replay(main, few, 0.25, 0)
    ids = [r["id"] for r in mixed[30:]]
    assert mixed[:30] == main and len(ids) == 10 and {ids.count(i) for i in ids} == {2, 3}
    one, other = ([r["id"] for r in mix_replay(main, many, 0.25, seed)[30:]] for seed in (0, 1))
    assert len(set(one)) == 10 and one != other and one == [r["id"] for r in mix_replay(main, many, 0.25, 0)[30:]]
    media = {"id": "m", "messages": [turn("user", {"type": "image", "path": "a.png"})]}
    for wrong, word in (([], "no records"), ([media], "has media"), ([{"id": "q", "text": "a"}], "no conversation")):
        with pytest.raises(UserError, match=word):
            mix_replay(main, wrong, 0.25, 0)


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"kl_to_base": 1.0, "train": {"llm": "full"}}, "set llm: lora"),
        ({"kl_to_base": 1.0}, "set llm: lora"),
        ({"perplexity": "none.txt", "train": {"llm": "lora"}}, "none.txt"),
        ({"replay": {"data": "none.jsonl"}}, "none.jsonl"),
    ],
)
def test_mistakes_are_told_before_the_first_step(world, tmp_path, changes, word):  # noqa: F811
    with pytest.raises(UserError, match=word) as e:
        tune("tune", config(world, **changes), tmp_path / "run")
    assert "\n" not in str(e.value) and not (tmp_path / "run").exists()
