"""The shared encoder against torch's own layers, its masks and its taps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmllm.blocks.transformer import Encoder, attend


def torchs(width, heads, layers):
    layer = nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def test_same_weights_and_outputs_as_torchs_encoder():
    torch.manual_seed(0)
    theirs, mine = torchs(24, 3, 2), Encoder(24, 3, 2)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    mine.load_state_dict(theirs.state_dict())
    x, mask = torch.randn(3, 7, 24), torch.arange(7)[None] < torch.tensor([7, 4, 1])[:, None]
    out, taps = mine(x)
    assert taps is None
    torch.testing.assert_close(out, theirs(x), atol=1e-5, rtol=1e-5)
    expected = theirs(x, src_key_padding_mask=~mask)
    torch.testing.assert_close(mine(x, mask)[0][mask], expected[mask], atol=1e-5, rtol=1e-5)


def test_what_is_masked_changes_nothing_and_taps_are_the_states():
    torch.manual_seed(0)
    encoder, x = Encoder(16, 2, 3), torch.randn(2, 5, 16)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    changed = torch.where(mask[..., None], x, torch.full_like(x, 9.0))
    out, taps = encoder(x, mask, (0, 1, -1))
    again, _ = encoder(changed, mask)
    assert torch.equal(out[mask], again[mask]) and bool(out.isfinite().all())
    assert torch.equal(taps[0], x) and torch.equal(taps[-1], out)
    torch.testing.assert_close(taps[1], encoder.layers[0](x, (mask | ~mask.any(-1, keepdim=True))[:, None, None]))
    with pytest.raises(ValueError, match="layer 4"):
        encoder(x, mask, (4,))


@pytest.mark.parametrize("allowed", [None, "padding", "causal", "bias"])
def test_attention_with_gradients_is_torchs_own_and_so_are_its_gradients(allowed):
    torch.manual_seed(0)
    count = 7 if allowed == "bias" else 5  # a query transformer's memory has a length of its own
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64, requires_grad=True) for n in (5, count, count))
    nowhere = torch.finfo(torch.float64).min
    masks = {
        "bias": torch.zeros(2, 1, 1, 7, dtype=torch.float64).index_fill_(3, torch.tensor([1, 6]), nowhere),
        "padding": (torch.arange(5)[None] < torch.tensor([[5], [2]]))[:, None, None],
        "causal": torch.ones(5, 5).tril().bool(),
    }
    mask, weight = masks.get(allowed), torch.randn(2, 3, 5, 4, dtype=torch.float64)
    mine, theirs = attend(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(mine, theirs)
    for a, b in zip(
        torch.autograd.grad((mine * weight).sum(), (q, k, v)), torch.autograd.grad((theirs * weight).sum(), (q, k, v))
    ):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(attend(q, k, v, mask), mine)


def test_width_must_fit_the_heads():
    with pytest.raises(ValueError, match="multiple of 3"):
        Encoder(16, 3, 1)
