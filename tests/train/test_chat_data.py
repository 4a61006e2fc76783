"""What pretrain and tune read: every form in one run, shares of a mixture, and each bad record told with its place."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_tune import config, own_cache, turn, weights, world  # noqa: F401
from tiny_mm import tiny_llm
from transformers import AutoTokenizer

from mmllm.data.rejected import Rejected
from mmllm.errors import UserError
from mmllm.model import load_model
from mmllm.train.chat_data import ChatSource, read_chat
from mmllm.train.tune import tune

FINE = {"id": "fine", "messages": [turn("user", "yes?"), turn("assistant", "no")]}


def lines(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path.name


def picture(world, name="0.png"):  # noqa: F811
    return {"type": "image", "path": str(world / name)}


def rejected(run):
    return [json.loads(x) for x in (run / "rejected.jsonl").read_text().splitlines()]


def test_documents_captions_texts_and_conversations_train_in_one_run(world, tmp_path):  # noqa: F811
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    out = io.BytesIO()
    Image.new("RGB", (16, 16), (9, 99, 199)).save(out, "PNG")
    kinds = {"images": datasets.List(datasets.Image()), "texts": datasets.List(datasets.Value("string"))}
    rows = {"images": [[{"bytes": out.getvalue(), "path": None}, None]] * 2, "texts": [[None, "a bell"], [None, "no"]]}
    datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).to_parquet(tmp_path / "obelics.parquet")
    info = [{"image_name": str(world / "1.png"), "matched_text_index": 1}]
    lines(
        tmp_path / "more.jsonl",
        {"id": "mmc4", "text_list": ["Is it a cat?", "yes"], "image_info": info},
        {"id": "caption", "image": str(world / "2.png"), "text": ["a dog", "a cat"]},
        {"id": "text", "text": "Where is a dog?"},
        {"id": "openai", "messages": [turn("user", {"type": "image_url", "image_url": {"url": str(world / "3.png")}}),
                                      turn("assistant", "yes")]},
    )  # fmt: skip
    data = ["more.jsonl", {"path": "obelics.parquet", "streaming": True}, str(world / "train.jsonl")]
    settings = {"dataset": str(tmp_path), "data": data, "train": {"max_steps": 8}}
    run = tune("pretrain", config(world, **settings), tmp_path / "run")
    assert not (run / "rejected.jsonl").exists() and load_model(run)
    packed = tune("pretrain", config(world, **settings, pack=512), tmp_path / "packed")
    for made in (run, packed):
        rows = [json.loads(x) for x in (made / "metrics.jsonl").read_text().splitlines()[:8]]
        assert np.isfinite([row["loss"] for row in rows]).all()


def test_a_run_draws_by_weights_in_an_order_of_its_seed(world, tmp_path, monkeypatch):  # noqa: F811
    from mmllm.data.chat_batches import ChatBatches

    seen: list[str] = []
    called = ChatBatches.__call__

    def spy(self, step, rank=0, world=1):
        seen.extend(self.records[int(i)]["id"] for i in self.rows(step * world + rank)[0])
        return called(self, step, rank, world)

    monkeypatch.setattr(ChatBatches, "__call__", spy)
    lines(tmp_path / "a.jsonl", *({**FINE, "id": f"a{i}"} for i in range(12)))
    lines(tmp_path / "b.jsonl", *({**FINE, "id": f"b{i}"} for i in range(4)))
    data = [{"path": "a.jsonl", "weight": 1}, {"path": "b.jsonl", "weight": 3}]
    orders = []
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        seen.clear()
        train = {"max_steps": 4, "seed": seed}
        tune("pretrain", config(world, dataset=str(tmp_path), data=data, train=train), tmp_path / name)
        assert len(seen) == 16 and sum(x[0] == "b" for x in seen) == 12
        assert {seen.count(f"b{i}") for i in range(4)} == {3}
        orders.append(list(seen))
    assert orders[0] == orders[1] != orders[2]

    seen.clear()
    train = {"max_steps": 4, "seed": 0}
    data[1]["first"] = 8
    tune("pretrain", config(world, dataset=str(tmp_path), data=data, train=train), tmp_path / "first")
    assert {x[0] for x in seen[:8]} == {"b"} and sorted(seen) == sorted(orders[0])


def test_weights_for_some_sources_only_are_refused(world, tmp_path):  # noqa: F811
    lines(tmp_path / "a.jsonl", FINE)
    sources = [ChatSource(path="a.jsonl", weight=1), "a.jsonl"]
    with pytest.raises(UserError, match="data.1: this source has no weight"):
        read_chat(sources, tmp_path, Rejected())
    with pytest.raises(UserError, match="data.1.first: comes first, but has no weight"):
        read_chat(["a.jsonl", ChatSource(path="a.jsonl", first=3)], tmp_path, Rejected())
    with pytest.raises(UserError, match="wieght"):
        config(world, data=[{"path": "a.jsonl", "wieght": 1}])


def test_a_mixture_gives_replay_its_share(world, tmp_path):  # noqa: F811
    from mmllm.train.tune import read_data

    lines(tmp_path / "a.jsonl", *({**FINE, "id": f"a{i}"} for i in range(12)))
    lines(tmp_path / "b.jsonl", *({**FINE, "id": f"b{i}"} for i in range(8)))
    sources = [{"path": "a.jsonl", "weight": 2.0}, {"path": "b.jsonl", "weight": 2.0}]
    settings = config(world, data=sources, replay={"data": "b.jsonl", "weight": 0.5})
    data = read_data(settings, tmp_path, Rejected())
    assert data.weights == [0.25, 0.25, 0.5] and len(data) == 28
    assert data.mixture(0).counts == [7, 7, 14]


BAD = [
    ({"messages": [turn("robot", "x"), turn("assistant", "no")]}, "role out of"),
    ({"messages": [turn("user", "x")]}, "no assistant turn"),
    ({"conversations": [{"from": "robot", "value": "x"}]}, "unknown speaker 'robot'"),
    ({"image": ["0.png"], "conversations": [{"from": "human", "value": "<image><image>"}]}, "more <image> marks"),
    ({"images": ["0.png"], "messages": [turn("user", {"type": "image"}, {"type": "image"})]}, "more places"),
    ({"messages": [turn("user", "x"), turn("assistant", "<box>0,0,1200,9</box>")]}, "outside 0..999"),
    ({"image": "0.png", "text": "x", "boxes": [{"xyxy": [0.5, 0, 1.5, 1], "text": "x"}]}, "outside 0..1"),
    ({"messages": [turn("user", "x"), turn("assistant", "a dog, " * 300)]}, "the first turn ends after"),
    ({"messages": [turn("user", "x")], "branches": [[turn("user", "y"), turn("assistant", "a dog, " * 300)]]}, "ends"),
    ({"messages": [turn("user", {"type": "image", "path": "none.png"}), turn("assistant", "no")]}, "no such image"),
    ({"messages": [turn("user", {"type": "image", "path": "bad.png"}), turn("assistant", "no")]}, "not a picture"),
    ({"images": [None], "texts": [None]}, "place 0"),
    ({"meta": {}}, "nothing to learn"),
]


@pytest.mark.parametrize(("record", "words"), BAD, ids=[words for _, words in BAD])
def test_each_bad_record_is_told_with_file_line_and_id_before_the_first_step(world, tmp_path, record, words):  # noqa: F811
    shutil.copy(world / "0.png", tmp_path)
    (tmp_path / "bad.png").write_text("words")
    lines(tmp_path / "x.jsonl", FINE, {"id": "culprit", **record})
    settings = {"dataset": str(tmp_path), "data": ["x.jsonl", str(world / "train.jsonl")]}
    with pytest.raises(UserError, match=words) as e:
        tune("tune", config(world, **settings), tmp_path / "stop")
    told = str(e.value)
    assert "\n" not in told and f"{tmp_path}/x.jsonl:2" in told and "1 of 2" in told and "max_rejected" in told
    assert not (tmp_path / "stop" / "metrics.jsonl").exists()
    run = tune("tune", config(world, **settings, max_rejected=0.5, train={"max_steps": 2}), tmp_path / "run")
    (row,) = rejected(run)
    assert words in row["why"] and row["where"].startswith(f"{tmp_path}/x.jsonl:2") and row["source"] == "x.jsonl"
    assert row["where"].endswith("(id 'culprit')") and "(id 'culprit')" in told


def test_what_is_left_out_is_counted_and_the_rest_trains(world, tmp_path, capsys):  # noqa: F811
    wrong = {"id": "q", "messages": FINE["messages"][:1]}
    lines(tmp_path / "x.jsonl", *[{**FINE, "id": str(i)} for i in range(6)], wrong)
    settings = config(world, dataset=str(tmp_path), data="x.jsonl", max_rejected=0.2, train={"max_steps": 2})
    run = tune("pretrain", settings, tmp_path / "run")
    said = capsys.readouterr().out
    assert f"1 records left out, listed in {run / 'rejected.jsonl'}" in said and "6 conversations" in said


def test_a_template_that_refuses_an_order_of_roles_is_told_with_the_record(world, tmp_path):  # noqa: F811
    strict = tmp_path / "llm"
    shutil.copytree(world / "llm", strict)
    tokenizer = AutoTokenizer.from_pretrained(strict)
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (tmp_path / "strict.jinja").write_text(template)
    tokenizer.save_pretrained(strict)
    messages = [turn("system", "s"), *FINE["messages"]]
    lines(tmp_path / "x.jsonl", FINE, {"id": "sys", "messages": messages})
    settings = {"dataset": str(tmp_path), "data": "x.jsonl", "chat_template": str(tmp_path / "strict.jinja")}
    with pytest.raises(UserError, match=r"x.jsonl:2 \(id 'sys'\): .*refuses the roles system, user.*no system here"):
        tune("tune", config(world, **settings), tmp_path / "run")


def test_an_llm_without_chat_template_needs_one_named(world, tmp_path):  # noqa: F811
    model, tokenizer = tiny_llm(chatml=False)
    model.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    bare = {"llm": str(tmp_path / "llm"), "train": {"max_steps": 1}}
    with pytest.raises(UserError, match="llm: .*no chat template; set chat_template: plain"):
        tune("tune", config(world, **bare), tmp_path / "no")
    run = tune("tune", config(world, **bare, chat_template="plain"), tmp_path / "yes")
    assert "Assistant: " in load_model(run)[1].render(FINE["messages"])
    lines(tmp_path / "text.jsonl", {"text": "a cat"})
    more = {"dataset": str(tmp_path), "data": "text.jsonl"}
    assert tune("pretrain", config(world, **bare, **more), tmp_path / "documents")
    with pytest.raises(UserError, match="no such template"):
        tune("tune", config(world, **bare, chat_template="none.jinja"), tmp_path / "no")


@pytest.mark.parametrize(("key", "whose"), [("in_dim", "tower gives 24"), ("out_dim", "LLM takes 64")])
def test_a_connector_whose_width_does_not_fit_is_told(world, tmp_path, key, whose):  # noqa: F811
    vision = {**config(world).vision.model_dump(), "connector": {"type": "mlp", key: 7}}
    with pytest.raises(UserError, match=f"connector: {key} is 7, the {whose} numbers a token"):
        tune("tune", config(world, vision=vision), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_aligned_connector_of_another_width_is_told():
    from tiny_mm import tiny_towers

    from mmllm.connectors import build_connector
    from mmllm.model import build_model

    vision, _ = tiny_towers()
    for widths, words in (((24, 48), "gives 48 numbers a token, the LLM takes 64"), ((16, 64), "the tower gives 24")):
        connector = build_connector({"type": "mlp", "in_dim": widths[0], "out_dim": widths[1]})
        with pytest.raises(UserError, match=words):
            build_model(tiny_llm(), vision, connectors={"vision": connector}, dtype=torch.float32)


def test_a_resumed_mixture_ends_with_the_same_bits(world, tmp_path):  # noqa: F811
    data = [{"path": "train.jsonl", "weight": 1.0}, {"path": str(tmp_path / "b.jsonl"), "weight": 1.0}]
    lines(tmp_path / "b.jsonl", FINE, {"id": "d", "text": "a cat"})
    settings = config(world, data=data)
    whole = tune("tune", settings, tmp_path / "whole")
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "final")
    for late in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(cut / "checkpoints" / late)
    tune("tune", settings, cut, resume=True)
    one, other = weights(whole), weights(cut)
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_boxes_become_questions_and_marked_pictures_by_recipes(world, tmp_path):  # noqa: F811
    boxes = [{"xyxy": [2, 2, 16, 30], "text": "cat"}, {"xyxy": [17, 2, 30, 30], "text": "dog"}]
    scenes = [{"id": str(i), "image": str(world / f"{i}.png"), "boxes": boxes, "box_unit": "pixel"} for i in range(9)]
    out = {"xyxy": [0.2, 0, 0.1, 1], "text": "cat"}
    lines(tmp_path / "s.jsonl", *scenes, {"id": "bad", "image": str(world / "0.png"), "boxes": [out]})
    data = [{"path": "s.jsonl", "recipes": [name], "weight": 1} for name in ("grounding", "set_of_mark")]
    settings = config(world, dataset=str(tmp_path), data=data, max_rejected=0.1, train={"max_steps": 3})
    run = tune("tune", settings, tmp_path / "run")
    (row,) = rejected(run)  # one record of one file, although two sources read it
    assert row["where"] == f"{tmp_path}/s.jsonl:10 (id 'bad')" and "outside 0..1" in row["why"]
    data = read_chat(settings.data, tmp_path, Rejected(max_share=0.1))
    assert len(data) == 18 and all(r["branches"] for r in data.records)
    assert isinstance(data.records[0]["messages"][0]["content"][0]["path"], str)
    assert data.records[9]["messages"][0]["content"][0]["path"].name.endswith("with 2 marks")


def test_data_check_reads_a_tune_config_as_the_run_would(world, tmp_path):  # noqa: F811
    from click.testing import CliRunner

    from mmllm.cli.data import command

    (tmp_path / "bad.png").write_text("words")
    undecodable = {"id": "u", "messages": [turn("user", {"type": "image", "path": "bad.png"}), *FINE["messages"][1:]]}
    lines(tmp_path / "x.jsonl", FINE, {"id": "q", "messages": FINE["messages"][:1]}, undecodable)
    file = tmp_path / "tune.yaml"
    file.write_text(f"dataset: {tmp_path}\ndata: [{{path: x.jsonl, weight: 1}}]\n")
    done = CliRunner().invoke(command, ["check", str(file)])
    assert done.exit_code == 2 and f"{file}: 3 records, 2 problems" in done.output
    assert f"{tmp_path}/x.jsonl:2 (id 'q'): no assistant turn" in done.output
    assert f"{tmp_path}/x.jsonl:3 (id 'u'): " in done.output and "not a picture" in done.output
    lines(tmp_path / "x.jsonl", {"id": "q", "messages": FINE["messages"][:1]})
    assert "1 records, 1 problems" in CliRunner().invoke(command, ["check", str(file)]).output
