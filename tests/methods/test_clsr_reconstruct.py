"""CLSR's oracles: the catalogue's entry 67."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mmllm.align.objectives import InfoNCE
from mmllm.config import parse_config
from mmllm.contracts import Features
from mmllm.errors import UserError
from mmllm.methods.clsr_reconstruct import CLSR
from mmllm.train.align import AlignConfig, align
from tests.align.conftest import settings, world  # noqa: F401

PAIR = ["audio", "text"]
OFF = {"intra": False, "spread": 0.0, "reconstruct": 0.0}


def with_features(batch, features):
    for name, pooled in features.items():
        batch.streams[name].features = Features(pooled[:, None], torch.ones(len(pooled), 1).bool(), pooled)
    return batch


@pytest.fixture
def batch(make_batch, unit):
    rows = {"audio": unit(5, 8), "text": unit(5, 8, seed=1)}
    return with_features(make_batch(rows, scale=1 / 0.07), {"audio": unit(5, 6, seed=2), "text": unit(5, 4, seed=3)})


def test_all_switches_off_is_infonce(batch):
    expected = InfoNCE(PAIR)(batch)["loss"]
    torch.testing.assert_close(CLSR(PAIR, **OFF)(batch)["loss"], expected)
    torch.testing.assert_close(CLSR(PAIR, **OFF, temperature=None)(batch)["loss"], expected)
    batch.labels = ["a", "b", "a", "c", "d"]
    torch.testing.assert_close(CLSR(PAIR, **OFF)(batch)["loss"], InfoNCE(PAIR)(batch)["loss"])


def test_own_modality_only_adds_to_the_denominator(make_batch):
    text = torch.eye(8)[4:8]  # orthogonal to every sound
    audio = F.normalize(torch.rand(4, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    audio = F.pad(audio, (0, 4)).requires_grad_()
    batch = make_batch({"audio": audio, "text": text})
    plain = CLSR(PAIR, **OFF)(batch)["loss"]
    with_own = CLSR(PAIR, **(OFF | {"intra": True}))(batch)["loss"]
    assert (with_own > plain).all()
    first = torch.autograd.grad(with_own[0], audio, retain_graph=True)[0]
    assert (first[1:].norm(dim=1) > 0).all()  # other sounds are pushed away by sound 0, whatever the texts say
    assert torch.autograd.grad(plain[0], audio)[0][1:, :4].abs().max() == 0


def test_the_whole_contrast_written_out(batch):
    made = CLSR(PAIR, reconstruct=0, centred=False)
    z, f = ([batch.streams[s].embedding for s in PAIR], [batch.streams[s].features.pooled for s in PAIR])
    g = ((f[0] @ f[0].T + f[1] @ f[1].T) / 2).clamp(0, 1)
    tau = 0.07 * (1 + g)
    tau.fill_diagonal_(0.07)
    expected = torch.zeros(5)
    for x, y in (z, z[::-1]):
        across, inside = (x @ y.T / tau).exp(), (x @ x.T / tau).exp()
        total = across.sum(1) + inside.fill_diagonal_(0).sum(1)
        expected += 0.5 * (total.log() - across.diagonal().log())
    torch.testing.assert_close(made(batch)["loss"], expected)


def test_a_negatives_gradient_is_its_share_over_its_temperature(make_batch, unit):
    x, y = unit(4, 8), unit(4, 8, seed=1).requires_grad_()
    made = CLSR(PAIR, intra=False, reconstruct=0)
    features = [unit(4, 3, seed=2), unit(4, 3, seed=3)]
    same = torch.eye(4).bool()
    tau = 0.07 / made.factor(features, same)
    assert (CLSR(PAIR, spread=0).factor(features, same) == 1).all()
    p = (x @ y.T / tau).softmax(1)
    # Of the mean over the items, the half from sound to text alone: rows x are the queries.
    from mmllm.blocks.tiled_contrast import contrast

    factor = made.factor(features, same)
    loss = contrast(x, y, scale=1 / 0.07, scale_fn=lambda i, j: factor[i, j]).mean()
    (grad,) = torch.autograd.grad(loss, y)
    expected = torch.stack([sum((p[i, j] - float(i == j)) / tau[i, j] * x[i] for i in range(4)) / 4 for j in range(4)])
    torch.testing.assert_close(grad, expected)


def test_likeness_is_taken_around_the_mean(unit):
    features, same = [unit(6, 3) + 20, unit(6, 3, seed=1)], torch.eye(6).bool()
    same_shifted = CLSR(PAIR).factor([features[0] + 5, features[1] - 2], same)
    torch.testing.assert_close(CLSR(PAIR).factor(features, same), same_shifted, atol=1e-4, rtol=0)
    assert CLSR(PAIR, centred=False).factor([features[0]] * 2, same)[0, 1] < 0.51  # as good as equal
    assert CLSR(PAIR).factor([features[0]] * 2, same).max(1).values.min() == 1


def test_items_of_one_label_are_no_negatives_of_their_modality(make_batch, unit):
    x, y = unit(3, 8), unit(3, 8, seed=1)
    found = CLSR(PAIR, spread=0, reconstruct=0)(make_batch({"audio": x, "text": y}, labels=["a", "a", "c"]))["loss"]
    expected = 0
    for own, other in ((x, y), (y, x)):
        logits = own[0] @ other.T / 0.07
        total = torch.cat([logits, (own[0] @ own[2] / 0.07)[None]]).logsumexp(0)  # of its own side only item 2
        expected += 0.5 * (total - logits[:2].mean())
    torch.testing.assert_close(found[0], expected)


def decoding(batch):
    made = CLSR(PAIR)
    towers = {"audio": SimpleNamespace(pooled_size=6), "text": SimpleNamespace(pooled_size=4)}
    made.setup(SimpleNamespace(embedding_dim=8, tower=towers.get))
    return made


def test_rebuilding_reaches_decoders_and_embeddings_but_no_feature(batch):
    for stream in batch.streams.values():
        stream.features.pooled.requires_grad_()
        stream.embedding.requires_grad_()
    made = decoding(batch)
    out = made(batch)
    out["loss"].mean().backward()
    assert all(p.grad.abs().max() > 0 for p in made.parameters())
    for stream in batch.streams.values():
        assert stream.features.pooled.grad is None and stream.embedding.grad.abs().max() > 0
    z = [batch.streams[s].embedding for s in PAIR]
    f = {s: batch.streams[s].features.pooled for s in PAIR}
    expected = sum((made.decoders[s](x) - f[s]).square().sum(1).mean() for s in PAIR for x in z)
    torch.testing.assert_close(out["reconstruction"], expected)


def test_items_that_lack_a_stream_do_not_count(make_batch, unit):
    rows, f = {"audio": unit(4, 8), "text": unit(4, 8, seed=1)}, {"audio": unit(4, 6), "text": unit(4, 4, seed=2)}
    full = with_features(make_batch(rows, ids=list("abcd")), f)
    made = decoding(full)
    keep = [0, 2, 3]
    less = with_features(make_batch({k: v[keep] for k, v in rows.items()}), {k: v[keep] for k, v in f.items()})
    full.streams["audio"].owner = torch.tensor([0, 2, 3])
    full.streams["audio"].embedding, full.streams["audio"].features = (
        less.streams["audio"].embedding, less.streams["audio"].features,
    )  # fmt: skip
    out = made(full)
    assert out["valid"].tolist() == [True, False, True, True]
    torch.testing.assert_close(out["loss"][keep], made(less)["loss"])


def test_mistakes_are_named():
    with pytest.raises(UserError, match="temperature must be above 0"):
        CLSR(PAIR, temperature=0)


def test_a_run_by_the_cards_line(settings, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path / "cache"))
    source = {"data": "sounds_train.jsonl", "streams": ["audio", "text"], "sampler": "distinct"}
    settings["phases"] = {
        "one": {
            "sources": {"sounds": source},
            "objectives": [{"type": "clsr", "options": {"pair": ["audio", "text"]}}],
            "trains": ["audio.tower", "audio.head", "text.head"],
            "train": {"max_steps": 3, "logging_steps": 1},
        }
    }
    settings["measures"] = {}
    align(parse_config(settings, AlignConfig), tmp_path / "run")
    assert "reconstruction" in next(tmp_path.rglob("metrics.jsonl")).read_text()
