"""Oracles of projectors on frozen towers: the catalogue's entry 42."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mmllm.connectors import build_connector
from mmllm.contracts import Features
from mmllm.evaluate.geometry import linear_cka
from mmllm.methods.freeze_align_projectors import ConceptBalanced, TokenProjector, collect
from mmllm.report.figures import read_figures
from tests.align.conftest import settings, world  # noqa: F401
from tests.methods.short_run import short_run


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def features(count=5, prefix=0, grid=None, seed=0):
    tokens = random(3, count, 6, seed=seed)
    return Features(tokens, torch.ones(3, count, dtype=torch.bool), tokens.mean(1), grid, prefix)


def head(**options):
    torch.manual_seed(0)
    return build_connector({"type": "token_projector", "in_dim": 6, "out_dim": 4, **options}).eval()


def test_cka_sees_through_rotation_scale_and_shift():
    x, y = random(20, 6).double(), random(20, 4, seed=1).double()
    turn = torch.linalg.qr(random(6, 6, seed=2).double()).Q
    assert abs(linear_cka(x, -3 * x @ turn + 5) - 1) < 1e-9
    assert abs(linear_cka(x, y) - linear_cka(y, x)) < 1e-12
    centred = x - x.mean(0)
    apart = y - centred @ torch.linalg.pinv(centred) @ y
    assert linear_cka(x, apart) < 1e-12


def test_without_its_second_way_a_projector_is_norm_and_linear():
    torch.manual_seed(0)
    one = TokenProjector(6, 4, 0.1).eval()
    torch.nn.init.zeros_(one.out.weight)
    torch.nn.init.zeros_(one.out.bias)
    x = random(3, 6)
    torch.testing.assert_close(one(x), one.straight(F.layer_norm(x, (6,))))


def test_the_mean_of_the_cells_and_the_class_token():
    seen = features(5, prefix=1, grid=(1, 2, 2))
    made, mask = head()(seen)
    one = head()
    expected = one.local(seen.tokens[:, 1:]).mean(1) + one.whole(seen.tokens[:, 0])
    torch.testing.assert_close(made[:, 0], expected)
    assert made.shape == (3, 1, 4) and mask.all()
    without = features(4, grid=(1, 2, 2))
    torch.testing.assert_close(one(without)[0][:, 0], one.local(without.tokens).mean(1) + one.whole(without.pooled))
    torch.testing.assert_close(head(class_token=False)(seen)[0][:, 0], one.local(seen.tokens[:, 1:]).mean(1))


def test_padding_does_not_change_a_text():
    seen, text = features(5), head(residual_head=True)
    padded = Features(torch.cat([seen.tokens, random(3, 2, 6, seed=3)], 1), seen.mask, seen.pooled)
    padded.mask = torch.cat([seen.mask, torch.zeros(3, 2, dtype=torch.bool)], 1)
    torch.testing.assert_close(text(padded)[0], text(seen)[0])
    h = text.first(text.local(seen.tokens).mean(1))
    expected = F.layer_norm(h + text.second(F.gelu(h)), (4,))
    torch.testing.assert_close(text(seen)[0][:, 0], expected)


def test_collecting_takes_nothing_twice_and_rare_concepts_first():
    scores = torch.tensor([[0.9, 0.8, 0.1], [0.8, 0.1, 0.2], [0.7, 0.6, 0.0], [0.6, 0.5, 0.3], [0.1, 0.4, 0.0]])
    chosen = collect(scores, 1, 3)  # mean of the best three: 0.8, 0.633, 0.2
    assert chosen == [[1], [0], [3]]
    many = torch.rand(40, 6, generator=torch.Generator().manual_seed(0))
    chosen = collect(many, 5, 12)
    picked = [i for rows in chosen for i in rows]
    assert len(picked) == len(set(picked)) and all(len(rows) <= 5 for rows in chosen)
    first = int(many.topk(12, 0).values.mean(0).argmin())
    assert chosen[first] == many[:, first].topk(5).indices.tolist()


def test_the_recipe_balances_concepts(world):  # noqa: F811
    options = {"concepts": ["red square", "blue bar"], "model": str(world / "text")}
    records = [{"id": str(i), "text": "red square" if i < 9 else "blue bar"} for i in range(11)]
    balanced = list(ConceptBalanced(2, **options).apply(iter(records)))
    assert [r["text"] for r in balanced] == ["red square"] * 2 + ["blue bar"] * 2
    uniform = list(ConceptBalanced(2, uniform=True, **options).apply(iter(records)))
    assert len({r["id"] for r in uniform}) == 4 and uniform != balanced


def test_the_card_switches_it_on(settings, tmp_path):  # noqa: F811
    settings["streams"]["image"]["connector"] = {"type": "token_projector"}
    settings["streams"]["text"]["connector"] = {"type": "token_projector", "residual_head": True}
    line = [{"type": "infonce", "options": {"pair": ["image", "text"], "scorer": "late_interaction"}}]
    about = {"data": "things_val.jsonl", "streams": ["image", "text"]}
    measures = {
        "cka": {"kind": "encoder_cka", **about},
        "found": {"kind": "pairs", "by": "label", "scorer": "late_interaction", **about},
    }
    rows = short_run(settings, tmp_path / "run", line, ["image.connector", "text.connector"], measures)
    assert [r["infonce:image:text"] > 0 for r in rows if "loss" in r] == [True] * 3
    found = {f.name: f.value for f in read_figures(tmp_path / "run" / "final" / "results.json")}
    assert 0 < found["cka_image_text"] <= 1 and 0 <= found["found_image_to_text_r1"] <= 1
