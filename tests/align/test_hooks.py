"""One small demonstration of each kind of hook, through real runs by config."""

from __future__ import annotations

import json

import pytest
import torch

from mmllm import registry
from mmllm.blocks.queue import FeatureQueue
from mmllm.config import parse_config
from mmllm.contracts import BatchSampler, DataRecipe, InputTransform, Objective, Scorer, StepHook, Transform
from mmllm.errors import UserError
from mmllm.train.align import AlignConfig, AlignStage, align
from mmllm.train.run import RunFolder

SEEN: dict[str, list] = {}


DEMOS: dict[str, dict[str, type]] = {}


def demo(kind, name):
    """Notes a class for the registry; it is there only during the tests of this file (others go through all names)."""
    return lambda cls: DEMOS.setdefault(kind, {}).setdefault(name, cls)


@pytest.fixture(autouse=True)
def own_cache_and_names(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path_factory.mktemp("cache")))
    for kind, classes in DEMOS.items():
        registry.names(kind)  # the methods and plugins of this kind are loaded before the copy is made
        monkeypatch.setitem(registry._REGISTRY, kind, registry._REGISTRY.get(kind, {}) | classes)
    SEEN.clear()


def note(key, value):
    SEEN.setdefault(key, []).append(value)


@demo("step_hook", "demo_hook")
class DemoHook(StepHook):
    """Trains only on the items with the larger half of the losses."""

    def before_forward(self, model, batch, step):
        note("order", ("before_forward", step))

    def after_loss(self, model, batch, losses, step):
        note("order", ("after_loss", step))
        each, valid = losses["each"]["infonce:image:text"]
        assert each.shape == (8,) and valid.all()
        losses["loss"] = each.topk(4).values.mean()

    def after_backward(self, model, step):
        note("order", ("after_backward", step))
        note("gradient", all(p.grad is not None for p in self.groups["image.head"]))

    def before_optimizer_step(self, model, step):
        note("order", ("before_optimizer_step", step))


@demo("batch_sampler", "demo_sampler")
class DemoSampler(BatchSampler):
    def __init__(self, keys, batch_size, seed, start=0):
        self.size, self.batch_size, self.start = len(keys), batch_size, start

    def indices(self, step):
        return [(self.start + step + k) % self.size for k in range(self.batch_size)]


@demo("transform", "demo_transform")
class DemoTransform(Transform):
    field = "image"

    def __call__(self, item, rng):
        note("transform", item["image"].size)
        return {**item, "image": item["image"].rotate(90)}


@demo("input_transform", "demo_input_transform")
class DemoInputTransform(InputTransform):
    modality, gives = "text", frozenset({"lengths"})

    def __call__(self, inputs, generator):
        return inputs, {"lengths": inputs["attention_mask"].sum(1)}


@demo("data_recipe", "demo_recipe")
class DemoRecipe(DataRecipe):
    def apply(self, records):
        yield from (r for r in records if r["label"].startswith(("red", "blue")))


@demo("scorer", "demo_scorer")
class DemoScorer(Scorer):
    """Minus the distance."""

    def score(self, query, gallery):
        return -torch.cdist(query, gallery)


@demo("objective", "demo_objective")
class DemoObjective(Objective):
    """A queue of texts as negatives, a matrix of its own, a derived stream that it brings along, and the bank."""

    lr_multiplier = 0.5
    streams = {"text@demo": {"of": "text", "input_transforms": ["demo_input_transform"], "cache": False}}
    needs = frozenset({"image.embedding", "text.embedding", "text@demo.lengths"})

    def setup(self, model):
        self.matrix = torch.nn.Parameter(torch.eye(model.embedding_dim))
        self.queue = FeatureQueue(20, model.embedding_dim)

    def on_epoch(self, bank):
        rows, items = bank.embedding("image")
        note("bank", (len(rows), len(set(items.tolist())), bool((rows.norm(dim=-1) - 1).abs().max() < 1e-4)))

    def forward(self, batch):
        note("lengths", batch.streams["text@demo"].extras["lengths"].tolist())
        a, b = batch.streams["image"].embedding @ self.matrix, batch.streams["text"].embedding
        self.recent = b.detach()
        logits = 10 * a @ torch.cat([b, self.queue.content()]).T
        return {"loss": torch.nn.functional.cross_entropy(logits, torch.arange(len(a)), reduction="none")}

    def after_step(self, model):
        self.queue.push(self.recent)
        note("queue", len(self.queue))


def run(settings, out, steps=3, **phase):
    both = settings["phases"]["both"]
    source = both["sources"]["things"] | phase.pop("source", {})
    both |= {
        "sources": {"things": source},
        "objectives": both["objectives"][:1],
        "train": {"max_steps": steps, "logging_steps": steps},
    }
    both |= {"trains": ["image.head", "text.head"], **phase}
    config = parse_config(settings | {"phases": {"both": both}, "measures": settings.get("measures", {})}, AlignConfig)
    return align(config, out)


def test_step_hook(settings, tmp_path):
    run(settings | {"measures": {}}, tmp_path / "run", hooks=["demo_hook"])
    moments = ["before_forward", "after_loss", "after_backward", "before_optimizer_step"]
    assert SEEN["order"] == [(m, s) for s in range(3) for m in moments] and all(SEEN["gradient"])


def test_batch_sampler_and_data_recipe(settings, tmp_path):
    stage = AlignStage(parse_config(settings, AlignConfig))
    spec = stage.config.phases["both"].sources["things"]
    spec = spec.model_copy(update={"sampler": "demo_sampler", "recipes": ["demo_recipe"]})
    source = stage._source("things", spec, {"image": {"embedding"}, "text": {"embedding"}}, set(), 0, 8, True)
    assert {r["label"].split()[0] for r in source.records} == {"red", "blue"} and len(source.records) == 16
    assert source.batch(2)["items"].tolist() == list(range(2, 10))
    sampler = {"type": "demo_sampler", "options": {"start": 3}}
    run(settings | {"measures": {}}, tmp_path / "run", source={"sampler": sampler, "recipes": ["demo_recipe"]})


def test_transform(settings, tmp_path):
    source = {"transforms": ["demo_transform"], "augment": "none"}
    run(settings | {"measures": {}}, tmp_path / "run", trains=["image", "text.head"], source=source)
    assert len(SEEN["transform"]) == 24  # three batches of eight


def test_scorer_in_the_loss_and_in_a_measure(settings, tmp_path):
    settings["measures"] = {
        "things": {"kind": "pairs", "by": "label", "data": "things_val.jsonl", "streams": ["image", "text"]}
    }
    settings["measures"]["things"]["scorer"] = "demo_scorer"
    objective = {"type": "infonce", "options": {"pair": ["image", "text"], "scorer": "demo_scorer"}}
    out = run(settings, tmp_path / "run", steps=40, objectives=[objective], trains=["image", "text.head"])
    figures = {f["name"]: f for f in json.loads((out / "final" / "results.json").read_text())["figures"]}
    assert figures["things_image_to_text_r1"]["value"] > 2 * figures["things_image_to_text_r1"]["chance"]


def test_objective_with_a_queue_a_matrix_a_stream_and_the_bank(settings, tmp_path):
    demo = {"type": "demo_objective", "weight": {"start": 0.5, "end": 1.0}}
    out = run(settings | {"measures": {}}, tmp_path / "run", steps=6, objectives=[demo], source={"sampler": "shuffle"})
    assert SEEN["queue"] == [8, 16, 20, 20, 20, 20]
    assert SEEN["bank"] == [(32, 32, True)] * 2  # four batches of eight are an epoch of 32 items
    assert all(len(lengths) == 8 and set(lengths) <= {2, 5} for lengths in SEEN["lengths"])
    logged = json.loads((out / "metrics.jsonl").read_text())
    assert logged["weight/demo_objective"] == pytest.approx(0.5 + 0.5 * (15 / 6) / 6)  # the mean over six steps


def test_a_phase_begins_with_fresh_parts(settings, tmp_path):
    both = settings["phases"]["both"]
    both |= {"train": {"max_steps": 3}, "objectives": both["objectives"][:1]}
    both["sources"] = {"things": both["sources"]["things"]}
    both["trains"] = ["image.head", "text.head"]
    settings["phases"] = {"one": both, "two": both | {"reset": ["image.head"]}}
    config = parse_config(settings | {"measures": {}}, AlignConfig)
    stage = AlignStage(config, RunFolder.open(tmp_path / "run", "align", config))
    stage.train_phase(0, config.phases["one"])
    image, text = (stage.model.heads[n][-1].weight.clone() for n in ("image", "text"))
    from mmllm.train.align_trains import reset

    reset(config, stage.model, config.phases["two"])
    assert not torch.allclose(stage.model.heads["image"][-1].weight, image)
    assert torch.equal(stage.model.heads["text"][-1].weight, text)


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        ({"hooks": ["demo_hok"]}, "did you mean 'demo_hook'"),
        ({"hooks": [{"type": "demo_hook", "size": 1}]}, "unknown option 'size'"),
        ({"source": {"sampler": "demo_smpler"}}, "did you mean 'demo_sampler'"),
        ({"source": {"recipes": ["demo_recip"]}}, "did you mean 'demo_recipe'"),
        ({"source": {"transforms": ["demo_trnsform"]}}, "did you mean 'demo_transform'"),
        ({"reset": ["image.tower"]}, "a tower cannot be reset"),
    ],
)
def test_wrong_names_are_one_line(settings, tmp_path, phase, words):
    with pytest.raises(UserError, match=words) as caught:
        run(settings | {"measures": {}}, tmp_path / "run", **phase)
    assert "\n" not in str(caught.value)
