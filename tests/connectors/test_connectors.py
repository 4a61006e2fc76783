"""Connectors: token counts are exact, padding never matters, the stated starting points hold, folders round-trip."""

import pytest
import torch

from mmllm.connectors import build_connector, load_connector_folder
from mmllm.contracts import Features
from mmllm.errors import UserError

KINDS = [
    {"type": "linear"},
    {"type": "mlp", "hidden_dim": 24, "depth": 3, "norm": True},
    {"type": "avg_pool", "stride": 3},
    {"type": "avg_pool", "tokens": 4},
    {"type": "qformer", "num_queries": 5, "hidden_dim": 16, "num_heads": 2, "num_layers": 3, "cross_every": 2},
]
GRID = {"type": "grid_mlp", "hidden_dim": 24, "positions": True, "grid": [4, 3]}


def make(config, seed=0):
    torch.manual_seed(seed)
    return build_connector({"in_dim": 12, "out_dim": 8, **config}).eval()


def features(lengths, width=12, n=None, seed=1):
    torch.manual_seed(seed)
    n = n or max(lengths)
    mask = torch.arange(n)[None] < torch.tensor(lengths)[:, None]
    tokens = torch.randn(len(lengths), n, width)
    return Features(tokens, mask, tokens.mean(1))


@pytest.mark.parametrize("config", KINDS, ids=lambda c: c["type"])
def test_number_of_valid_tokens_is_what_num_tokens_says(config):
    connector, lengths = make(config), [1, 2, 5, 7, 9]
    tokens, mask = connector(features(lengths))
    assert tokens.shape[-1] == 8 and tokens.shape[:2] == mask.shape
    assert mask.sum(1).tolist() == [connector.num_tokens(n) for n in lengths]
    # valid tokens come first, so that they can be taken in order
    assert torch.equal(mask, mask.int().sort(dim=1, descending=True).values.bool())


@pytest.mark.parametrize("config", KINDS, ids=lambda c: c["type"])
def test_padding_and_neighbours_do_not_change_an_item(config):
    connector, batch = make(config), features([3, 9])
    alone = Features(batch.tokens[:1, :3], batch.mask[:1, :3], batch.pooled[:1])
    tokens, mask = connector(batch)
    single, single_mask = connector(alone)
    torch.testing.assert_close(tokens[0][mask[0]], single[0][single_mask[0]], atol=1e-6, rtol=1e-5)


def test_grid_connector_counts_drops_class_tokens_and_starts_as_an_mlp():
    connector, grid = make(GRID), (2, 4, 3)
    tokens = torch.randn(2, 1 + 24, 12)
    f = Features(tokens, torch.ones(2, 25, dtype=torch.bool), tokens[:, 0], grid=grid, num_prefix=1)
    out, mask = connector(f)
    assert out.shape == (2, 24, 8) and mask.all() and connector.num_tokens(grid) == 24
    x = connector.norm(tokens[:, 1:])
    expected = connector.fc2(torch.nn.functional.gelu(connector.fc1(x)))
    torch.testing.assert_close(out, expected)


def test_grid_convolution_reads_only_the_neighbouring_cells_of_the_same_frame():
    connector = make(GRID)
    torch.nn.init.normal_(connector.neighbours.weight)
    tokens = torch.randn(1, 24, 12)
    changed = tokens.clone()
    changed[0, 4] += 1.0 * torch.randn(12)  # frame 0, row 1, column 1
    mask = torch.ones(1, 24, dtype=torch.bool)
    a = connector(Features(tokens, mask, tokens[:, 0], grid=(2, 4, 3)))[0]
    b = connector(Features(changed, mask, tokens[:, 0], grid=(2, 4, 3)))[0]
    moved = ((a - b).abs().amax(-1) > 1e-6).view(2, 4, 3)[:, :, :]
    assert moved[0, :3].all() and not moved[0, 3].any() and not moved[1].any()


def test_positions_are_row_plus_column_and_interpolate():
    connector = make(GRID)
    torch.nn.init.normal_(connector.rows)
    torch.nn.init.normal_(connector.columns)
    p = connector.position_vectors(4, 3).view(4, 3, 24)
    torch.testing.assert_close(p[2, 1], connector.rows[2] + connector.columns[1])
    assert connector.position_vectors(8, 6).shape == (48, 24)


def test_average_pooling_on_a_grid_is_the_mean_of_the_cells():
    connector = make({"type": "avg_pool", "stride": 2, "depth": 1, "norm": False})
    tokens = torch.randn(1, 15, 12)
    f = Features(tokens, torch.ones(1, 15, dtype=torch.bool), tokens[:, 0], grid=(1, 3, 5))
    out, mask = connector(f)
    assert mask.sum() == connector.num_tokens((1, 3, 5)) == 6
    cells = tokens.view(3, 5, 12)
    expected = connector.mlp(torch.stack([cells[:2, :2].mean((0, 1)), cells[2, 4]]))
    torch.testing.assert_close(out[0, [0, 5]], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config", [*KINDS, GRID], ids=lambda c: c["type"])
def test_saved_folder_gives_the_same_connector(config, tmp_path):
    connector = make(config)
    connector.save_pretrained(tmp_path)
    again = load_connector_folder(tmp_path)
    assert again.to_config() == connector.to_config()
    for (name, a), (_, b) in zip(connector.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", ["grid_mlp", "perceiver", "qformer"])
def test_positions_switched_on_at_loading_change_nothing_before_training(kind, tmp_path):
    connector = make({"type": kind, "hidden_dim": 24}).eval()
    connector.save_pretrained(tmp_path)
    again = load_connector_folder(tmp_path, positions=True, grid=[4, 3]).eval()
    tokens = torch.randn(2, 12, 12)
    f = Features(tokens, torch.ones(2, 12, dtype=torch.bool), tokens[:, 0], grid=(1, 4, 3))
    assert torch.equal(connector(f)[0], again(f)[0])


@pytest.mark.parametrize(
    "config, word",
    [
        ({"type": "mpl"}, "mlp"),
        ({"type": "mlp", "hiden_dim": 3}, "hidden_dim"),
        ({"type": "qformer", "hidden_dim": 10, "num_heads": 4}, "multiple"),
        ({"type": "grid_mlp", "positions": True}, "grid"),
        ({}, "type"),
    ],
)
def test_mistakes_are_told_in_one_line(config, word):
    with pytest.raises(UserError, match=word) as e:
        make(config)
    assert "\n" not in str(e.value)


def test_wrong_width_and_missing_folder(tmp_path):
    with pytest.raises(UserError, match="in_dim"):
        make({"type": "mlp"})(features([3], width=7))
    with pytest.raises(UserError, match="no connector"):
        load_connector_folder(tmp_path)
