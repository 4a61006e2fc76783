"""Every connector on many grids and lengths: exact counts, blind to padding, all parameters learn, configs rebuild."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmllm.connectors import build_connector, load_connector_folder
from mmllm.connectors.adaptive import pool_grid
from mmllm.connectors.token_merge import merge_round
from mmllm.contracts import Features
from mmllm.errors import UserError

IN, OUT = 6, 8
HEADS = {"hidden_dim": 8, "num_heads": 2}
KINDS = {
    "linear": {"type": "linear"},
    "mlp": {"type": "mlp", "norm": True},
    "grid_mlp": {"type": "grid_mlp", "hidden_dim": 8, "positions": True, "grid": [3, 4]},
    "avg_pool": {"type": "avg_pool", "stride": 2},
    "avg_pool_fixed": {"type": "avg_pool", "tokens": 3},
    "adaptive_pool": {"type": "adaptive_pool", "rows": 3, "columns": 2},
    "pixel_shuffle": {"type": "pixel_shuffle", "factor": 2},
    "pixel_shuffle_3": {"type": "pixel_shuffle", "factor": 3, "norm": False},
    "qformer": {"type": "qformer", "num_queries": 5, "num_layers": 3, "cross_every": 2, **HEADS},
    "qformer_text": {"type": "qformer", "num_queries": 5, "text_dim": 7, **HEADS},
    "perceiver": {"type": "perceiver", "num_latents": 5, "frames": 3, **HEADS},
    "token_merge": {"type": "token_merge", "keep": 0.3},
    "token_merge_fixed": {"type": "token_merge", "tokens": 4},
    "c_abstractor": {"type": "c_abstractor", "rows": 3, "columns": 2, "hidden_dim": 8, "blocks": 1},
}
NEEDS_GRID = {"grid_mlp", "c_abstractor"}
KEEPS_A_GRID = {
    "linear", "mlp", "grid_mlp", "avg_pool", "adaptive_pool", "pixel_shuffle", "pixel_shuffle_3", "c_abstractor"
}  # fmt: skip
GRIDS = st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7))
MANY = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def make(name, seed=0):
    torch.manual_seed(seed)
    return build_connector({"in_dim": IN, "out_dim": OUT, **KINDS[name]}).eval()


def text_for(name, batch, length=4):
    if name != "qformer_text":
        return None
    torch.manual_seed(9)
    mask = torch.ones(batch, length, dtype=torch.bool)
    return Features(torch.randn(batch, length, 7), mask, torch.zeros(batch, 7))


def on_grid(grid, batch=2, prefix=1, frames=None, seed=1):
    """Features of a grid with class tokens; from frame ``frames`` on everything is padding."""
    torch.manual_seed(seed)
    t, h, w = grid
    tokens = torch.randn(batch, prefix + t * h * w, IN)
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
    if frames is not None:
        mask[:, prefix + frames * h * w :] = False
    return Features(tokens, mask, tokens[:, 0], grid=grid, num_prefix=prefix)


@pytest.mark.parametrize("name", KINDS)
def test_count_is_exact_on_every_grid(name):
    connector = make(name)

    @MANY
    @given(grid=GRIDS)
    def check(grid):
        with torch.no_grad():
            tokens, mask = connector(on_grid(grid), text_for(name, 2))
        assert tokens.shape == (2, connector.num_tokens(grid), OUT) and mask.dtype == torch.bool and mask.all()
        assert tokens.isfinite().all()
        out = connector.out_grid(grid)
        assert (out is not None) == (name in KEEPS_A_GRID) and (out is None or math.prod(out) == tokens.shape[1])

    check()
    assert connector.out_grid(None) is None


@pytest.mark.parametrize("name", sorted(set(KINDS) - NEEDS_GRID))
def test_count_is_exact_for_every_length(name):
    connector = make(name)

    @MANY
    @given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3))
    def check(lengths):
        torch.manual_seed(0)
        mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
        tokens = torch.randn(*mask.shape, IN)
        with torch.no_grad():
            out, valid = connector(Features(tokens, mask, tokens[:, 0]), text_for(name, len(lengths)))
            alone = Features(tokens[:1, : lengths[0]], mask[:1, : lengths[0]], tokens[:1, 0])
            single, single_valid = connector(alone, text_for(name, 1))
        assert valid.sum(1).tolist() == [connector.num_tokens(n) for n in lengths]
        text = text_for(name, len(lengths))
        if text is None or len(lengths) == 1:  # the texts of other batches are other random ones
            torch.testing.assert_close(out[0][valid[0]], single[0][single_valid[0]], atol=1e-5, rtol=1e-4)

    check()


@pytest.mark.parametrize("name", KINDS)
def test_padding_frames_count_for_nothing_and_their_numbers_do_not_matter(name):
    connector, short = make(name), on_grid((2, 4, 3), frames=2)
    padded = on_grid((3, 4, 3), frames=2)
    padded.tokens[:, :25] = short.tokens
    other = on_grid((3, 4, 3), frames=2, seed=5)
    other.tokens[:, :25] = short.tokens
    with torch.no_grad():
        expected = connector(short, text_for(name, 2))
        for features in (padded, other):
            tokens, mask = connector(features, text_for(name, 2))
            assert mask.sum(1).tolist() == expected[1].sum(1).tolist() == [connector.num_tokens((2, 4, 3))] * 2
            torch.testing.assert_close(tokens[mask], expected[0][expected[1]], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_every_parameter_and_every_input_token_gets_a_gradient(name):
    connector, features = make(name).train(), on_grid((3, 4, 4), prefix=0)
    features.tokens.requires_grad_(True)
    tokens, _ = connector(features, text_for(name, 2))
    torch.manual_seed(3)
    (tokens * torch.randn_like(tokens)).sum().backward()
    for key, p in connector.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, key
    assert (features.tokens.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("name", KINDS)
def test_a_config_through_json_rebuilds_the_connector(name, tmp_path):
    connector, features = make(name), on_grid((2, 4, 3))
    again = build_connector(json.loads(json.dumps(connector.to_config())))
    assert again.to_config() == connector.to_config()
    connector.save_pretrained(tmp_path)
    again = load_connector_folder(tmp_path).eval()
    text = text_for(name, 2)
    assert torch.equal(again(features, text)[0], connector(features, text)[0])


@pytest.mark.parametrize("name", sorted(NEEDS_GRID))
def test_connectors_of_grids_say_so_off_a_grid(name):
    features = on_grid((1, 2, 3))
    features.grid = None
    with pytest.raises(UserError, match="grid"):
        make(name)(features)
    with pytest.raises(UserError, match="grid"):
        build_connector({"in_dim": IN, "out_dim": OUT, **KINDS["c_abstractor"]}).num_tokens(12)


# ---- what each one computes -----------------------------------------------------------------------------------------


def test_pixel_shuffle_joins_the_cells_of_a_block_row_by_row():
    connector = make("pixel_shuffle")
    connector.mlp = torch.nn.Identity()
    features = on_grid((1, 4, 6), batch=1, prefix=0)
    out, _ = connector(features)
    cells = features.tokens.view(4, 6, IN)
    assert torch.equal(out[0, 4], torch.cat([cells[2, 2], cells[2, 3], cells[3, 2], cells[3, 3]]))


def test_adaptive_pooling_is_torchs():
    torch.manual_seed(0)
    cells = torch.randn(2, 1, 7, 5, IN)
    ours, _ = pool_grid(cells, torch.ones(2, 1, 7, 5, dtype=torch.bool), 3, 4)
    theirs = torch.nn.functional.adaptive_avg_pool2d(cells[:, 0].permute(0, 3, 1, 2), (3, 4))
    torch.testing.assert_close(ours[:, 0].permute(0, 3, 1, 2), theirs)


def test_token_merging_averages_the_most_alike_and_keeps_the_mean_of_all():
    a, b, c = torch.eye(3)
    x = torch.stack([a, b, c, 2 * a])[None]  # at even places a and c, at odd ones b and 2a: a and 2a are most alike
    ones = torch.ones(1, 4)
    out, size, mask = merge_round(x, ones, ones.bool(), torch.tensor([3]))
    assert torch.equal(out[0], torch.stack([b, c, 1.5 * a])) and size.tolist() == [[1, 1, 2]] and mask.all()
    again, size, _ = merge_round(out, size, mask, torch.tensor([1]))  # sizes weigh the next means
    torch.testing.assert_close((again * size[..., None]).sum(1), x.sum(1))


def test_the_query_transformers_text_changes_its_queries_and_padding_of_the_text_does_not():
    connector, features = make("qformer_text"), on_grid((1, 3, 3))
    text = text_for("qformer_text", 2)
    out = connector(features, text)[0]
    assert not torch.allclose(out, connector(features)[0], atol=1e-4)
    swapped = Features(text.tokens.flip(1), text.mask, text.pooled)
    assert not torch.allclose(out, connector(features, swapped)[0], atol=1e-4), "order of words counts"
    junk = torch.randn(2, 3, 7)
    for parts in ((text.tokens, junk), (junk, text.tokens)):
        mask = torch.cat([torch.full(p.shape[:2], p is text.tokens) for p in parts], 1)
        padded = Features(torch.cat(parts, 1), mask, text.pooled)
        torch.testing.assert_close(connector(features, padded)[0], out, atol=1e-5, rtol=1e-4)
    silent = Features(text.tokens, torch.zeros_like(text.mask), text.pooled)
    torch.testing.assert_close(connector(features, silent)[0], connector(features)[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match="text_dim"):
        make("qformer")(features, text)
    with pytest.raises(UserError, match="frames"):
        make("perceiver")(on_grid((4, 2, 2)))


def test_c_abstractors_convolutions_stay_within_their_frame():
    connector, features = make("c_abstractor"), on_grid((2, 4, 4), batch=1, prefix=0)
    before = connector(features)[0]
    features.tokens[0, 5] += torch.randn(IN)
    moved = (connector(features)[0] - before).abs().amax(-1)[0].view(2, -1) > 0
    assert moved[0].all() and not moved[1].any()


@pytest.mark.parametrize(
    "config, word",
    [
        ({"type": "pixel_shuffle", "factor": 0}, "factor"),
        ({"type": "token_merge", "keep": 1.5}, "keep"),
        ({"type": "adaptive_pool", "rows": 0}, "rows"),
        ({"type": "perceiver", "hidden_dim": 9}, "multiple"),
        ({"type": "c_abstractor", "blocks": 0}, "blocks"),
        ({"type": "qformer", "text_dim": 0}, "text_dim"),
    ],
)
def test_mistakes_are_told_in_one_line(config, word):
    with pytest.raises(UserError, match=word) as e:
        build_connector({"in_dim": IN, "out_dim": OUT, **config})
    assert "\n" not in str(e.value)
