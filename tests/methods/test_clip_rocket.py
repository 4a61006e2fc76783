"""CLIP Rocket's oracles: the catalogue's entry 7. The changes of pictures and words are in tests/data."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mmllm.align.objectives import InfoNCE
from mmllm.config import parse_config
from mmllm.contracts import AlignBatch, Features, Stream
from mmllm.errors import UserError
from mmllm.methods.clip_rocket import ClipRocket, bar_term, siam_term, sinkhorn, swal_term
from mmllm.train.align import align
from mmllm.train.align_config import AlignConfig
from tests.align.conftest import settings, world  # noqa: F401

PAIR = ["image", "text"]


def pooled(rows, owner=None):
    return Stream(Features(rows[:, None], torch.ones(len(rows), 1, dtype=torch.bool), rows), owner=owner)


def made(unit, views=2, same=False, owner=None):
    """Plain and strong streams of six items; ``same``: the strong views are the plain ones."""
    streams = {}
    for n, s in enumerate(PAIR):
        plain = unit(6, 8, seed=n)
        held = None if owner is None or s == "image" else owner
        plain = plain if held is None else plain[held]
        streams[s] = pooled(plain, held)
        streams[s].embedding = plain
        for k in range(views):
            strong = plain if same else unit(len(plain), 8, seed=10 + 3 * n + k)
            streams[f"{s}@strong{k}"] = pooled(strong, held)
    return AlignBatch(streams, list("abcdef"), logit_scale={"image:text": torch.tensor(1 / 0.07)})


def ready(identity=False, **options):
    torch.manual_seed(0)
    objective = ClipRocket(PAIR, **{"hidden_dim": 16, "out_dim": 8, **options})
    objective.setup(SimpleNamespace(tower=lambda s: SimpleNamespace(pooled_size=8)))
    if identity:
        objective.heads = torch.nn.ModuleDict({s: torch.nn.Identity() for s in PAIR})
    return objective


def test_without_views_it_is_clip(unit):
    batch = made(unit)
    torch.testing.assert_close(ready(views=0)(batch)["loss"], InfoNCE(PAIR)(batch)["loss"])


@pytest.mark.parametrize("views", [1, 2, 3])
def test_with_the_same_views_and_heads_it_is_clip(views, unit):
    batch = made(unit, views, same=True)
    objective = ready(identity=True, views=views, label_smoothing=0.0)
    torch.testing.assert_close(objective(batch)["loss"], InfoNCE(PAIR)(batch)["loss"])


def test_equals_the_formula(unit):
    batch, objective = made(unit), ready()
    with torch.no_grad():
        objective.log_scale.fill_(1.5)
    target = torch.arange(6)

    def both(a, b, scale, smoothing):
        z = scale * a @ b.T
        one, two = (F.cross_entropy(x, target, label_smoothing=smoothing) for x in (z, z.T))
        return (one + two) / 2

    plain = both(batch.streams["image"].embedding, batch.streams["text"].embedding, 1 / 0.07, 0.0)
    views = {
        s: [F.normalize(objective.heads[s](batch.streams[f"{s}@strong{k}"].features.pooled), dim=-1) for k in (0, 1)]
        for s in PAIR
    }
    strong = torch.stack([both(a, b, torch.tensor(1.5).exp(), 0.1) for a in views["image"] for b in views["text"]])
    out = objective(batch)
    torch.testing.assert_close(out["loss"].mean(), (plain + 2 * strong.mean()) / 3)
    torch.testing.assert_close(out["strong"], strong.mean())
    torch.testing.assert_close(out["plain"], plain)


def test_items_without_a_text_take_no_part(unit):
    owner = torch.tensor([0, 2, 5])
    objective, batch = ready(extra=["siam", "bar", "swal"]), made(unit, owner=owner)
    out = objective(batch)
    assert out["valid"].tolist() == [True, False, True, False, False, True]
    for name in ("image", "image@strong0", "image@strong1"):
        stream = batch.streams[name]
        batch.streams[name] = pooled(stream.features.pooled[owner])
        batch.streams[name].embedding = None if stream.embedding is None else stream.embedding[owner]
    for name in ("text", "text@strong0", "text@strong1"):
        batch.streams[name].owner = None
    batch.ids = list("ace")
    whole = objective(batch)
    torch.testing.assert_close(out["loss"][owner], whole["loss"])
    assert all(torch.isfinite(out[k]) for k in ("siam", "bar", "swal"))


def test_bar_is_zero_for_equal_coordinates_alone():
    x = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    assert bar_term(x, 3 * x + 2) == pytest.approx(0.0, abs=1e-10)
    assert bar_term(x, x[:, [1, 0]]) == pytest.approx(2 + 0.005 * 2)
    assert bar_term(x, -x) == pytest.approx(8.0)


def test_siam_is_zero_for_equal_directions_and_leaves_its_target_alone(unit):
    a, b = unit(4, 5).requires_grad_(), unit(4, 5, seed=1).requires_grad_()
    assert siam_term(3 * a, a.detach()).item() == pytest.approx(0, abs=1e-6)
    assert siam_term(a, -a).item() == pytest.approx(4)
    siam_term(a, b).backward()
    assert a.grad.abs().sum() > 0 and b.grad is None


def test_sinkhorn(unit):
    scores = unit(6, 4) @ unit(3, 4, seed=1).T
    torch.testing.assert_close(sinkhorn(scores).sum(1), torch.ones(6))
    off = [float((sinkhorn(scores, rounds=r).sum(0) - 2).abs().max()) for r in (1, 5, 2000)]
    assert off[0] > off[1] > off[2] and off[2] < 1e-3


def test_swal_aims_at_the_other_views(unit):
    alike = (unit(5, 4) @ unit(5, 4, seed=1).T).requires_grad_()
    other = (unit(5, 4, seed=2) @ unit(5, 4, seed=3).T).requires_grad_()
    expected = -(sinkhorn(other) * (7 * alike).log_softmax(1)).sum(1).mean()
    found = swal_term(alike, other, torch.tensor(7.0))
    torch.testing.assert_close(found, expected)
    found.backward()
    assert other.grad is None and alike.grad.abs().sum() > 0


def test_mistakes_are_named():
    with pytest.raises(UserError, match="did you mean 'siam'"):
        ClipRocket(PAIR, extra=["siamm"])
    with pytest.raises(UserError, match="views must be at least 0"):
        ClipRocket(PAIR, views=-1)


def test_a_run_with_strong_views(settings, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path / "cache"))
    both = settings["phases"]["both"]
    both["sources"] = {"things": both["sources"]["things"] | {"augment": "none"}}
    options = {"pair": PAIR, "hidden_dim": 16, "out_dim": 8, "extra": ["siam"]}
    both |= {"objectives": [{"type": "clip_rocket", "options": options}], "trains": ["image.tower", "image.head"]}
    both["train"] = {"max_steps": 2, "logging_steps": 1}
    settings["phases"] = {"both": both}
    settings["measures"] = {"things": {"kind": "retrieval", "data": "things_val.jsonl", "streams": PAIR}}
    out = align(parse_config(settings, AlignConfig), tmp_path / "run")
    text = (out / "metrics.jsonl").read_text()
    assert all(f'"{name}"' in text for name in ("plain", "strong", "siam", "strong_scale"))
