"""Losses and parameter gradients of a small two-tower model, as one process or one of several sees them.

python rank_losses.py RANK SIZE STORE OUT
"""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from mmllm.blocks.ranks import Ranks
from mmllm.blocks.tiled_contrast import contrast, tiled_sigmoid

B, WIDTH, D = 12, 6, 5


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(WIDTH, D), nn.Linear(WIDTH, D)
        self.logit_scale, self.logit_bias = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor(-2.0))
        self.temperature = nn.Parameter(torch.tensor(0.3))

    def forward(self, images, texts):
        return F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1)


def cases(labels):
    """Name -> loss of the embeddings; pair functions count items over all processes."""

    def same(i, j):
        return labels[i][:, None] == labels[j]

    def allowed(i, j):
        return (torch.arange(B)[i][:, None] * 7 + torch.arange(B)[j] * 3) % 5 != 1

    def tokens(x, y, temperature):
        return (x[:, None] * y).sum(-1).tanh() / temperature

    soft = {"same label": {"target_fn": same}, "masked": {"allow_fn": allowed}, "smoothed": {"label_smoothing": 0.1}}
    soft |= {"reverse": {"divergence": "reverse_kl", "target_fn": same}, "outside": {"positive_in_denominator": False}}
    soft |= {k: {"divergence": k, "margin": 0.5, "target_fn": same} for k in ("hinge", "hardest_hinge")}
    soft |= {"plain": {}, "one direction": {"symmetric": False}, "any score": {"score_fn": tokens}}
    sigmoid = {"sigmoid": {}, "sigmoid same label": {"target_fn": same}, "sigmoid masked": {"allow_fn": allowed}}
    return soft, sigmoid


def losses(ranks):
    """Name -> {"loss", parameter: gradient}, averaged over the processes."""
    generator = torch.Generator().manual_seed(1)
    images, texts = (torch.randn(B, WIDTH, generator=generator) for _ in range(2))
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 0, 6, 1, 7, 8, 6])
    mine = slice(ranks.rank * B // ranks.size, (ranks.rank + 1) * B // ranks.size)
    soft, sigmoid = cases(labels)
    found = {}
    for name, options in (soft | sigmoid).items():
        model = Towers()
        x, y = model(images[mine], texts[mine])
        if name in sigmoid:
            scale, bias = model.logit_scale.exp(), model.logit_bias
            each = tiled_sigmoid(x, y, scale=scale, bias=bias, ranks=ranks, tile=5, **options)
        else:
            args = {"score_args": [model.temperature]} if "score_fn" in options else {}
            options = {"symmetric": True, **options, **args}
            each = contrast(x, y, scale=model.logit_scale.exp(), ranks=ranks, tile=5, **options)
        loss = each.mean()
        loss.backward()
        ranks.average_gradients(model.parameters())
        mean = loss.detach().clone()
        ranks.sum(mean)
        grads = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in model.named_parameters()}
        found[name] = {"loss": mean / ranks.size} | grads
    return found


if __name__ == "__main__":
    rank, size, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    torch.save(losses(Ranks()), out)
    dist.destroy_process_group()
