"""Requests in lmms-eval's forms answered by the real tiny model; where lmms-eval is installed, its own runner too."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny_mm import tiny_model

from mmllm.decode import Decoder, Request
from mmllm.errors import UserError
from mmllm.evaluate.lmms import Bridge


@pytest.fixture(scope="module")
def decoder():
    net, processor = tiny_model()
    return Decoder(net.eval(), processor)


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)) for _ in range(3)]
    docs = [{"image": p, "question": f"Is there a {x}?", "answer": a}
            for p, x, a in zip(pictures, ("cat", "dog", "owl"), ("yes", "no", "yes"))]  # fmt: skip
    return {"t": {"test": docs}}


def ask(*args):
    return SimpleNamespace(args=args)


def visual(doc):
    return [doc["image"]]


def test_simple_and_chat_requests_ask_the_same(decoder, documents):
    bridge, docs = Bridge(decoder), documents["t"]["test"]

    def to_messages(doc):
        content = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": doc["question"]}]
        return [{"role": "user", "content": content}]

    simple = [ask(f"<image>\n{d['question']}", {"max_new_tokens": 4}, visual, i, "t", "test")
              for i, d in enumerate(docs)]  # fmt: skip
    chat = [ask("", to_messages, {"max_new_tokens": 4}, i, "t", "test") for i in range(3)]
    settings = [{"max_new_tokens": 4, "until": ["\n\n"], "temperature": 0, "image_aspect_ratio": "pad"}] * 3
    told = bridge.generate([bridge.simple(r, documents) for r in simple], settings)
    assert told == bridge.generate([bridge.chat(r, documents) for r in chat], settings)
    content = [[{"type": "image", "image": d["image"]}, {"type": "text", "text": d["question"]}] for d in docs]
    direct = [Request([{"role": "user", "content": c}], max_new_tokens=4, stop=("\n\n",)) for c in content]
    assert told == [r.text for r in decoder.generate(direct)]


def test_likelihood_is_the_decoders_score(decoder, documents):
    bridge, docs = Bridge(decoder), documents["t"]["test"]
    requests = [ask(d["question"], f" {a}", visual, i, "t", "test") for i, d in enumerate(docs) for a in ("yes", "no")]
    requests.append(ask(docs[0]["question"], lambda d: d["answer"], visual, 0, "t", "test"))
    requests.append(ask("", "yes"))
    messages = [bridge.simple(r, documents) for r in requests]
    found = bridge.likelihood(messages, [bridge.target(r, documents) for r in requests])
    direct = decoder.score([Request(m) for m in messages], [[a] for a in ("yes", "no") * 3] + [["yes"], ["yes"]])
    assert [v for v, _ in found] == pytest.approx([s[0] for s in direct], abs=1e-4)
    assert found[0][0] == found[6][0] and len(messages[-1][0]["content"]) == 1
    said = decoder.generate([Request(messages[0], max_new_tokens=3)])[0]
    text = decoder.encoder.tokenizer.decode(said.token_ids)
    if list(decoder.encoder.tokenizer(text, add_special_tokens=False)["input_ids"]) == list(said.token_ids):
        greedy = bridge.likelihood([messages[0], messages[0]], [text, text + "zz"])
        assert [g for _, g in greedy] == [True, False]


def test_media_of_every_kind(decoder, tmp_path):
    bridge = Bridge(decoder, video_frames=2)
    picture, wave = Image.new("RGB", (8, 8)), np.zeros(8000, np.float32)
    frames = [Image.new("RGB", (8, 8), (50 * i, 0, 0)) for i in range(4)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "film.gif").rename(tmp_path / "film.mov")
    kinds = [p["type"] for p in bridge.parts([picture, {"array": wave, "sampling_rate": 8000}, [None, "a/b.wav"]])]
    assert kinds == ["image", "audio", "audio"]
    sound = bridge.parts({"array": np.stack([wave, wave]), "sampling_rate": 8000})[0]["audio"]
    assert sound.shape == (decoder.encoder.sampling_rate,)
    assert bridge.parts("x.JPG") == [{"type": "image", "path": "x.JPG"}]
    with pytest.raises(UserError, match="no picture, sound or video"):
        bridge.parts(3.5)
    try:
        assert len(bridge.parts(str(tmp_path / "film.mov"))) == 2
    except UserError as e:
        assert "PyAV" in str(e)


def test_settings_of_a_task(decoder):
    bridge = Bridge(decoder)
    assert bridge.method({"temperature": 0, "do_sample": True}) == "greedy"
    assert bridge.method({"temperature": 0.5, "top_p": 0.9, "top_k": None}) == "sample:temperature=0.5,top_p=0.9"
    assert bridge.method({"temperature": 0.5, "do_sample": False}) == "greedy"
    assert Bridge(decoder, "vcd").method({"temperature": 0.5}) == "vcd"
    with pytest.raises(UserError, match="beams"):
        bridge.generate([bridge.turn("hello", None)], [{"num_beams": 5}])
    assert bridge.generate([], []) == []


def test_rounds_end_one_by_one(decoder, documents):
    bridge, seen = Bridge(decoder), []

    def next_turn(doc, previous_output, round_idx, previous_round_info):
        seen.append((doc["answer"], round_idx, len(previous_output), previous_round_info))
        stop = round_idx > (2 if doc["answer"] == "no" else 1)
        return None, "And now?", stop, previous_output, f"round {round_idx}"

    requests = [ask("What?", {"max_new_tokens": 2}, visual, next_turn, i, "t", "test") for i in range(2)]
    said = bridge.rounds(requests, documents)
    assert [len(x) for x in said] == [2, 3]
    assert seen[0] == ("yes", 1, 1, None) and seen[-1] == ("no", 3, 3, "round 2")


@pytest.mark.peers
def test_the_real_package_finds_both_classes_and_scores_as_we_do(decoder, documents, tmp_path):
    pytest.importorskip("lmms_eval")
    from lmms_eval.models import get_model
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from mmllm.evaluate.lmms import manifest
    from mmllm.evaluate.lmms_models import MmllmChat, MmllmSimple

    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    assert registry.get_model_class("mmllm") is MmllmChat is get_model("mmllm")
    assert registry.get_model_class("mmllm", force_simple=True) is MmllmSimple
    _score_as_we_do(decoder, documents, tmp_path)


def _score_as_we_do(decoder, documents, folder):
    """A local yes/no task through lmms-eval's own runner, against our decoder's answers."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from mmllm.evaluate.lmms_models import MmllmSimple

    rows = []
    for i, doc in enumerate(documents["t"]["test"]):
        doc["image"].save(folder / f"{i}.png")
        rows.append({"path": str(folder / f"{i}.png"), "question": doc["question"], "answer": doc["answer"]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "utils.py").write_text(
        "from PIL import Image\n\n\ndef visual(doc):\n    return [Image.open(doc['path']).convert('RGB')]\n\n\n"
        "def results(doc, said):\n    return {'hit': float(said[0].strip().lower() == doc['answer'])}\n\n\n"
        "def mean(hits):\n    return sum(hits) / len(hits)\n")  # fmt: skip
    (folder / "task.yaml").write_text(
        "task: mmllm_yes_no_local\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {folder / 'rows.jsonl'}\ntest_split: test\noutput_type: generate_until\n"
        "doc_to_visual: !function utils.visual\ndoc_to_text: question\ndoc_to_target: answer\n"
        "generation_kwargs:\n  max_new_tokens: 4\nprocess_results: !function utils.results\nmetric_list:\n"
        "  - metric: hit\n    aggregation: !function utils.mean\n    higher_is_better: true\n")  # fmt: skip
    manager = TaskManager("ERROR", include_path=str(folder))
    found = simple_evaluate(model=MmllmSimple(decoder=decoder), tasks=["mmllm_yes_no_local"], task_manager=manager)
    bridge = Bridge(decoder)
    turns = [bridge.turn(r["question"], Image.open(r["path"]).convert("RGB")) for r in rows]
    ours = bridge.generate(turns, [{"max_new_tokens": 4, "until": ["\n\n"]}] * len(rows))
    hits = [said.strip().lower() == r["answer"] for said, r in zip(ours, rows)]
    assert found["results"]["mmllm_yes_no_local"]["hit,none"] == pytest.approx(sum(hits) / len(hits))
