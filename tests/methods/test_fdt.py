"""FDT's oracles: the catalogue's entry 1. Sparsemax itself is in tests/blocks."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

from mmllm.config import parse_config
from mmllm.connectors import build_connector
from mmllm.contracts import Features
from mmllm.errors import UserError
from mmllm.methods.fdt import Fdt, overlap
from mmllm.train.align import align
from mmllm.train.align_config import AlignConfig
from tests.align.conftest import settings, world  # noqa: F401

PAIR = ["image", "text"]


def head(seed=0, **options):
    torch.manual_seed(seed)
    return build_connector({"type": "fdt", "in_dim": 6, "out_dim": 8, "codes": 10, "temperature": 1.0, **options})


def features(tokens, mask=None):
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask
    return Features(tokens, mask, tokens.mean(1))


class Model:
    """What the objective's setup looks at."""

    def __init__(self, **connectors):
        self.connectors = connectors

    def owner(self, stream, kind):
        return stream


def test_feature_is_written_out(unit):
    one, x = head(), unit(3, 4, 6)
    scores = torch.stack([(one.query(t) @ one.codebook.T / math.sqrt(8)).max(0).values for t in x])
    weights = one.weights(features(x))
    torch.testing.assert_close(weights.sum(-1), torch.ones(3))
    assert (weights == 0).any()
    # Sparsemax: every active code lies the same distance below its score, every other score is below that distance.
    gap = scores - weights
    for row, w in zip(gap, weights):
        torch.testing.assert_close(row[w > 0], row[w > 0].mean().expand(int((w > 0).sum())))
        assert (row[w == 0] <= row[w > 0].min() + 1e-6).all()
    token, mask = one(features(x))
    torch.testing.assert_close(token[:, 0], F.normalize(weights @ one.codebook, dim=-1))
    assert mask.shape == (3, 1) and mask.all()


def test_tokens_said_twice_count_once_under_max_alone(unit):
    x = unit(3, 4, 6)
    twice, turned = torch.cat([x, x[:, :2]], 1), x[:, [2, 0, 3, 1]]
    best = head()
    expected = best(features(x))[0]
    torch.testing.assert_close(best(features(twice))[0], expected)
    torch.testing.assert_close(best(features(turned))[0], expected)
    total = head(pool="sum")
    torch.testing.assert_close(total(features(turned))[0], total(features(x))[0])
    assert not torch.allclose(total(features(twice))[0], total(features(x))[0])


@pytest.mark.parametrize("pool", ["max", "mean", "sum"])
def test_padding_takes_no_part(pool, unit):
    one, x, mask = head(pool=pool), unit(3, 5, 6), (torch.arange(5) < 3).expand(3, 5)
    other = torch.where(mask[..., None], x, 9 * unit(3, 5, 6, seed=1))
    torch.testing.assert_close(one(features(other, mask))[0], one(features(x[:, :3]))[0])


def test_one_code_tells_nothing_apart(make_batch, unit):
    image, text = head(codes=1), head(1, codes=1)
    text.codebook = image.codebook
    f = {"image": image(features(unit(5, 3, 6))), "text": text(features(unit(5, 2, 6, seed=1)))}
    expected = F.normalize(image.codebook, dim=-1).expand(5, 8)
    torch.testing.assert_close(f["image"][0][:, 0], expected)
    torch.testing.assert_close(Fdt(PAIR)(make_batch(f))["loss"].mean(), torch.tensor(math.log(5)))


def test_the_codebook_learns_from_both_streams(make_batch, unit):
    image, text = head(), head(1)
    Fdt(PAIR).setup(Model(image=image, text=text))
    assert text.codebook is image.codebook
    gradients = []
    for kept in (image, text):
        tokens = {"image": image(features(unit(5, 3, 6))), "text": text(features(unit(5, 2, 6, seed=1)))}
        tokens = {k: (t if c is kept else t.detach(), m) for (k, (t, m)), c in zip(tokens.items(), (image, text))}
        loss = Fdt(PAIR)(make_batch(tokens))["loss"].mean()
        gradients.append(torch.autograd.grad(loss, image.codebook)[0])
    assert all(g.abs().sum() > 0 for g in gradients)


def test_overlap_of_active_codes():
    a = torch.tensor([[0.5, 0.5, 0, 0], [1.0, 0, 0, 0]])
    b = torch.tensor([[0.2, 0, 0.8, 0], [1.0, 0, 0, 0]])
    assert overlap(a, b) == pytest.approx((1 / 3 + 1) / 2)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="pool"):
        head(pool="first")
    with pytest.raises(UserError, match="differ in size"):
        Fdt(PAIR).setup(Model(image=head(), text=head(codes=4)))
    linear = build_connector({"type": "linear", "in_dim": 6, "out_dim": 8})
    with pytest.raises(UserError, match="connector of 'text'"):
        Fdt(PAIR).setup(Model(image=head(), text=linear))


def test_a_run_trains_one_codebook(settings, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path / "cache"))
    code = {"type": "fdt", "codes": 32, "temperature": 10}
    del settings["words"]
    settings["streams"] = {k: settings["streams"][k] for k in PAIR}
    settings["streams"]["image"]["connector"] = settings["streams"]["text"]["connector"] = code
    both = settings["phases"]["both"]
    both["sources"] = {"things": both["sources"]["things"] | {"augment": "none"}}
    both |= {"objectives": [{"type": "fdt", "options": {"pair": PAIR}}]}
    both |= {"trains": ["image.connector", "text.connector"], "train": {"max_steps": 3, "logging_steps": 3}}
    settings["phases"] = {"both": both}
    measure = {"data": "things_val.jsonl", "streams": PAIR}
    settings["measures"] = {
        "things": {"kind": "pairs", "by": "label", "scorer": "late_interaction", **measure},
        "codes": {"kind": "fdt_codes", **measure},
    }
    out = align(parse_config(settings, AlignConfig), tmp_path / "run")
    figures = {f["name"]: f["value"] for f in json.loads((out / "final" / "results.json").read_text())["figures"]}
    assert 0 < figures["codes_active_text"] <= 1 and 0 <= figures["codes_overlap"] <= 1
    from mmllm.align.folder import load_align

    held = load_align(out).connectors
    torch.testing.assert_close(held["image"].codebook, held["text"].codebook)
