"""What must hold for every mix whatever the model: closed forms, invariances, rules and masks on given logits."""

import math

import pytest
import torch
from transformers import MinPLogitsWarper

from mmllm.decode import parse_spec
from mmllm.decode.layers import layer_numbers
from mmllm.decode.mix import combine, divergence, jensen_shannon, plausible, scores
from mmllm.decode.spec import Tap

V = 60


def logits(n=3, k=2, seed=0, v=V):
    return torch.randn(n, k, v, generator=torch.Generator().manual_seed(seed)) * 3


def run(text, z, step=0, taps=None):
    spec = parse_spec(text)
    return scores(z, [spec] * len(z), [step] * len(z), taps)


ROW_METHODS = ["vcd", "blank", "no_image", "icd", "patch_shuffle", "silence", "avisc", "sid", "pai", "m3id", "code"]


@pytest.mark.parametrize("method", ROW_METHODS)
def test_identical_views_give_the_base_on_the_plausible_tokens(method):
    z = logits()
    z[:, 1] = z[:, 0]
    out = run(method, z, step=5)
    kept = out.isfinite()
    assert kept.any(-1).all()
    torch.testing.assert_close(out[kept], z[:, 0][kept], atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", [*ROW_METHODS, "ritual", "vcd+icd:alpha=0.5"])
def test_a_constant_added_to_any_view_changes_no_probability(method):
    z = logits(k=3)
    reference = run(method, z, step=5).softmax(-1)
    for view in range(3):
        moved = z.clone()
        moved[:, view] += 7.5
        torch.testing.assert_close(run(method, moved, step=5).softmax(-1), reference, atol=1e-5, rtol=0)
    torch.testing.assert_close(run(method, z.log_softmax(-1), step=5).softmax(-1), reference, atol=1e-5, rtol=0)


def test_the_mix_is_linear_in_alpha():
    z = logits()
    for a0, a1 in ((0.5, 1.5), (1.0, 4.0)):
        difference = run(f"vcd:alpha={a1},beta=0", z) - run(f"vcd:alpha={a0},beta=0", z)
        torch.testing.assert_close(difference, (a1 - a0) * (z[:, 0] - z[:, 1]), atol=1e-4, rtol=0)


def test_joined_methods_add_their_terms_on_one_base():
    z = logits(k=3)
    out = run("vcd:alpha=1,beta=0+ritual:alpha=2,beta=0,transform=hflip", z)
    torch.testing.assert_close(out, 2 * z[:, 0] - z[:, 1] + 2 * z[:, 2], atol=1e-4, rtol=0)
    halved = run("vcd:alpha=1,beta=0+ritual:alpha=2,beta=0,transform=hflip,normalize=true", z)
    torch.testing.assert_close(halved, out / 3, atol=1e-4, rtol=0)


def test_equally_weighted_views_may_change_places():
    z = logits(k=3)
    text = "contrast:view=blank,beta=0.2+contrast:view=patch_shuffle,beta=0.2"
    assert torch.allclose(run(text, z), run(text, z[:, [0, 2, 1]]), atol=1e-5)


def test_joined_methods_compute_an_equal_view_once_and_keep_the_stricter_mask():
    spec = parse_spec("vcd:beta=0.1+vcd:alpha=2,beta=0.3")
    assert len(spec.views) == 1 and [m["beta"] for m in spec.masks] == [0.3]
    assert spec.weights == (4.0, -3.0)


def test_views_without_weight_are_not_computed():
    assert parse_spec("vcd:alpha=0+ritual:alpha=0").views == ()
    kept = parse_spec("vcd:alpha=0+blank")
    assert [view.media[0].name for view in kept.views] == ["blank"]


def test_plausibility_after_temperature_needs_another_beta():
    z = logits()[:, 0]
    for t, beta in ((0.5, 0.1), (2.0, 0.3)):
        assert (plausible(z / t, torch.full((3,), beta ** (1 / t))) == plausible(z, torch.full((3,), beta))).all()


def test_plausibility_shrinks_with_beta_and_keeps_the_best():
    z = logits()[:, 0]
    sizes = []
    for beta in (0.0, 0.01, 0.1, 0.5, 1.0):
        keep = plausible(z, torch.full((3,), beta))
        assert keep.gather(1, z.argmax(-1, keepdim=True)).all()
        sizes.append(int(keep.sum()))
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 3 * V
    assert torch.equal(run("apc:beta=0.2", z[:, None]).isfinite(), MinPLogitsWarper(0.2)(None, z.clone()).isfinite())


def test_half_precision_is_mixed_in_float32():
    z = logits().bfloat16()
    assert torch.equal(run("vcd:beta=0", z), run("vcd:beta=0", z.float()))


@pytest.mark.parametrize("method", [*ROW_METHODS, "ritual", "ritual:normalize=true"])
def test_forbidden_tokens_never_turn_into_nan(method):
    z = logits()
    z[:, 0, 3] = -math.inf
    z[:, 1, 4:40] = -math.inf
    out = run(method, z, step=3)
    assert not out.isnan().any() and (out[:, 3] == -math.inf).all() and out.isfinite().any(-1).all()


def test_m3id_grows_from_nothing():
    z = logits()
    torch.testing.assert_close(run("m3id:start=0,beta=0", z, step=0), z[:, 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(run("m3id:rate=0,beta=0", z, step=9), z[:, 0], atol=1e-4, rtol=0)
    for step in (0, 4, 30):
        weight = math.exp(0.02 * (step + 1)) - 1
        expected = z[:, 0] + weight * (z[:, 0] - z[:, 1])
        torch.testing.assert_close(run("m3id:beta=0", z, step=step), expected, atol=1e-3, rtol=0)
    capped = z[:, 0] + 3 * (z[:, 0] - z[:, 1])
    torch.testing.assert_close(run("m3id:beta=0", z, step=500), capped, atol=1e-3, rtol=0)


def test_m3id_leaves_sure_steps_alone():
    z = logits()
    z[0, 0, 5] = 50.0
    out = run("m3id:rate=1,tau=0.9,beta=0", z, step=3)
    torch.testing.assert_close(out[0], z[0, 0], atol=1e-4, rtol=0)
    assert not torch.allclose(out[1], z[1, 0], atol=0.1)


def test_code_between_agreement_and_contradiction():
    a, b = logits()[:, 0], logits(seed=1)[:, 0]
    assert torch.allclose(divergence(a, a), torch.zeros(3), atol=1e-6)
    d = divergence(a, b)
    assert ((d > 0) & (d < 1)).all()
    certain = torch.full((1, 2, V), -1e4)
    certain[0, 0, 3] = certain[0, 1, 9] = 0
    assert float(divergence(certain[:, 0], certain[:, 1])) == pytest.approx(1, abs=1e-6)
    out = run("code", certain)
    assert int(out.argmax(-1)) == 3 and int(out.isfinite().sum()) == 1
    z = torch.stack([a, b], dim=1)
    keep = torch.log_softmax(a, -1) >= torch.log_softmax(a, -1).amax(-1, keepdim=True) + d[:, None].log()
    expected = a + (1 - d)[:, None] * (a - b)
    out = run("code", z)
    assert torch.equal(out.isfinite(), keep)
    torch.testing.assert_close(out[keep], expected[keep], atol=1e-4, rtol=0)


def early(n=3, layers=4, seed=5):
    return torch.randn(n, layers, V, generator=torch.Generator().manual_seed(seed)) * 2


def tapped(method, z, states):
    (tap,) = parse_spec(method).taps
    return run(method, z, taps=[{tap: s} for s in states])


def test_dola_on_the_last_layer_is_even_on_the_plausible_tokens():
    z = logits(k=1)
    out = tapped("dola", z, z.expand(-1, 4, -1))
    keep = plausible(z[:, 0], torch.full((3,), 0.1))
    assert torch.equal(out.isfinite(), keep)
    assert all(float(row[k].std(correction=0)) < 1e-5 for row, k in zip(out, keep))


def test_dola_takes_the_most_divergent_layer_of_each_request():
    z, states = logits(k=1), early()
    out = tapped("dola:beta=0", z, states)
    for i in range(3):
        js = [float(jensen_shannon(z[i, 0], s)) for s in states[i]]
        best = states[i][max(range(4), key=js.__getitem__)]
        torch.testing.assert_close(out[i], z[i, 0] - best, atol=1e-4, rtol=0)
        alone = tapped("dola:beta=0", z[i : i + 1], states[i : i + 1])
        torch.testing.assert_close(alone[0], out[i], atol=1e-6, rtol=0)
    single = tapped("dola:beta=0,layers=7", z, states[:, :1])
    torch.testing.assert_close(single, z[:, 0] - states[:, 0], atol=1e-4, rtol=0)


def test_jensen_shannon_by_definition():
    a, b = logits()[:, 0].double(), logits(seed=3)[:, 0].double()
    p, q = a.softmax(-1), b.softmax(-1)
    m = (p + q) / 2
    expected = 0.5 * (p * (p / m).log()).sum(-1) + 0.5 * (q * (q / m).log()).sum(-1)
    torch.testing.assert_close(jensen_shannon(a, b).double(), expected, atol=1e-5, rtol=0)
    assert (jensen_shannon(a, b) <= math.log(2) + 1e-6).all()


def test_deco_without_weight_is_the_base_on_its_candidates():
    z = logits(k=1)
    out = run("deco:alpha=0", z)
    p = z[:, 0].softmax(-1)
    for i in range(3):
        order = p[i].argsort(descending=True)
        inside = [int(t) for k, t in enumerate(order[:20]) if float(p[i][order[:k]].sum()) < 0.9]
        assert set(out[i].isfinite().nonzero()[:, 0].tolist()) == set(inside)
    assert torch.equal(out.argmax(-1), z[:, 0].argmax(-1))


def test_deco_adds_the_layer_that_is_surest_of_a_candidate():
    z, states = logits(k=1), early()
    spec = parse_spec("deco")
    mixed, keep = combine(z, [spec] * 3, None, [{spec.taps[0]: s} for s in states])
    for i in range(3):
        p = states[i].softmax(-1)[:, keep[i]]
        layer = int(p.amax(-1).argmax())
        expected = z[i, 0] + 0.6 * p.max() * states[i, layer]
        torch.testing.assert_close(mixed[i], expected, atol=1e-4, rtol=0)


def test_vista_mixes_in_the_mean_of_late_layers():
    z, states = logits(k=1), early()
    out = tapped("vista:scale=0,gamma=0.3", z, states)
    torch.testing.assert_close(out, 0.7 * z[:, 0] + 0.3 * states.mean(1), atol=1e-4, rtol=0)


def test_methods_with_rules_and_taps_share_a_batch():
    z, states = logits(n=4, k=3), early(n=4)
    specs = [parse_spec(t) for t in ("dola", "m3id:rate=0.5", "code", "vcd+ritual")]
    taps = [{Tap("high"): states[0]}, {}, {}, {}]
    together = scores(z, specs, [0, 3, 1, 2], taps)
    for i, spec in enumerate(specs):
        alone = scores(z[i : i + 1], [spec], [[0, 3, 1, 2][i]], [taps[i]])
        assert torch.equal(together[i], alone[0])


def test_layer_ranges():
    assert layer_numbers("low", 30, tied=True) == [2, 4, 6, 8, 10, 12, 14]
    assert layer_numbers("high", 30) == list(range(15, 30, 2))
    assert layer_numbers("20:28", 32) == layer_numbers("0.625:0.875", 32) == list(range(20, 29))
    assert layer_numbers("4,2", 6) == [2, 4]
