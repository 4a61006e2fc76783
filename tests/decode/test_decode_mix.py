"""The mix against closed forms and against transformers' own warpers."""

import math

import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mmllm.decode import parse_spec
from mmllm.decode.mix import IMPLAUSIBLE, _cut, log_probabilities, mix, pick, plausible, scores


def logits(n=3, k=2, v=50, seed=0):
    return torch.randn(n, k, v, generator=torch.Generator().manual_seed(seed)) * 3


def test_vcd_by_hand():
    z = torch.tensor([[[2.0, 1.0, 0.0], [1.0, 2.0, 0.0]]])
    # (1 + 1) z0 - 1 z1, no mask
    assert scores(z, [parse_spec("vcd:alpha=1,beta=0")]).tolist() == [[3.0, 0.0, 0.0]]
    # ln 0.5 = -0.69: only tokens within 0.69 of the best base logit stay
    assert scores(z, [parse_spec("vcd:alpha=1,beta=0.5")]).tolist() == [[3.0, -math.inf, -math.inf]]


def test_ritual_by_hand():
    z = torch.tensor([[[2.0, 1.0], [1.0, 3.0]]])
    assert scores(z, [parse_spec("ritual:alpha=3,beta=0")]).tolist() == [[5.0, 10.0]]
    assert scores(z, [parse_spec("ritual:alpha=3,beta=0,normalize=true")]).tolist() == [[1.25, 2.5]]


def test_identical_views_give_gain_times_base():
    z = logits()
    same = torch.stack([z[:, 0], z[:, 0]], dim=1)
    for text in ("vcd:alpha=2.5,beta=0", "ritual:beta=0", "ritual:beta=0,normalize=true"):
        spec = parse_spec(text)
        torch.testing.assert_close(scores(same, [spec] * 3), spec.gain * z[:, 0], atol=1e-4, rtol=0)


def test_mask_is_min_p_at_temperature_one():
    z = logits()[:, 0]
    for beta in (0.05, 0.1, 0.5, 1.0):
        ours = plausible(z, torch.full((3,), beta))
        theirs = MinPLogitsWarper(beta)(None, z.clone()).isfinite()
        assert (ours == theirs).all()
    assert plausible(z, torch.zeros(3)).all()
    assert plausible(z, torch.ones(3)).sum() == 3  # beta 1 leaves the best token only


def test_mixed_specs_in_one_batch_equal_separate_ones():
    z = logits(n=4)
    specs = [parse_spec(t) for t in ("greedy", "vcd", "ritual", "vcd:beta=0")]
    together = scores(z, specs)
    for i, spec in enumerate(specs):
        assert torch.equal(together[i], scores(z[i : i + 1], [spec])[0])


def test_forbidden_tokens_stay_forbidden():
    z = logits()
    z[:, :, 7] = -math.inf
    z[:, 1, 8] = -math.inf
    out = mix(z, torch.tensor([[2.0, -1.0]] * 3))
    assert not out.isnan().any()
    assert (out[:, 7] == -math.inf).all()


def test_log_probabilities_match_the_scores_and_stay_finite():
    z, spec = logits(), parse_spec("vcd:beta=0.3")
    out = log_probabilities(z, spec)
    reference = scores(z, [spec] * 3).log_softmax(-1)
    kept = reference.isfinite()
    torch.testing.assert_close(out[kept], reference[kept])
    assert out.isfinite().all()
    assert (out[~kept] < IMPLAUSIBLE / 2).all()
    assert torch.equal(out.argmax(-1), reference.argmax(-1))


def test_cuts_equal_transformers():
    z = logits()[0, 0]
    for text, warper in (
        ("sample:top_k=5", TopKLogitsWarper(5)),
        ("sample:top_p=0.8", TopPLogitsWarper(0.8)),
        ("sample:min_p=0.2", MinPLogitsWarper(0.2)),
    ):
        assert torch.equal(_cut(z, parse_spec(text)), warper(None, z[None].clone())[0])


def test_ritual_identity_sampled_is_base_at_a_quarter_of_the_temperature():
    z = logits(n=1)
    same = torch.stack([z[:, 0], z[:, 0]], dim=1)
    ritual = parse_spec("ritual:beta=0,transform=identity,temperature=1")
    base = parse_spec("sample:temperature=0.25")
    for seed in range(20):
        draws = []
        for spec in (ritual, base):
            generator = torch.Generator().manual_seed(seed)
            draws.append(int(pick(scores(same, [spec]), [spec], [generator])[0]))
        assert draws[0] == draws[1]
