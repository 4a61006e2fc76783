"""Losses and parameter gradients of a small two-tower model, as one process or one of several sees them.

python rank_losses.py RANK SIZE STORE OUT
"""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmllm.blocks.chunks import in_chunks
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


class Step(nn.Module):
    """Towers in chunks and their loss, as one module that DistributedDataParallel can stand around."""

    def __init__(self, ranks):
        super().__init__()
        self.towers, self.ranks = Towers(), ranks
        self.towers.logit_bias.requires_grad_(False)
        self.towers.temperature.requires_grad_(False)

    def forward(self, images, texts):
        x, y = in_chunks(lambda part: self.towers(*part), (images, texts), 2)
        return contrast(x, y, scale=self.towers.logit_scale.exp(), ranks=self.ranks, symmetric=True, tile=5).mean()


def cases(labels):
    """Name -> loss of the embeddings; pair functions count items over all processes."""

    def same(i, j):
        return labels[i][:, None] == labels[j]

    def allowed(i, j):
        return (torch.arange(B)[i][:, None] * 7 + torch.arange(B)[j] * 3) % 5 != 1

    def tokens(x, y, temperature):
        return (x[:, None] * y).sum(-1).tanh() / temperature

    def coarse(x, y, temperature):
        """Many equal scores, with the gradient of the fine ones."""
        z = x @ y.T / temperature
        return z + (z.round() - z).detach()

    soft = {"same label": {"target_fn": same}, "masked": {"allow_fn": allowed}, "smoothed": {"label_smoothing": 0.1}}
    soft |= {"reverse": {"divergence": "reverse_kl", "target_fn": same}, "outside": {"positive_in_denominator": False}}
    soft |= {k: {"divergence": k, "margin": 0.5, "target_fn": same} for k in ("hinge", "hardest_hinge")}
    soft |= {"plain": {}, "one direction": {"symmetric": False}, "any score": {"score_fn": tokens}}
    soft |= {"masked, smoothed": {"allow_fn": allowed, "label_smoothing": 0.3}}
    soft |= {"ties": {"divergence": "hardest_hinge", "margin": 0.5, "score_fn": coarse}}
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
        found[name] = measured(loss, model, ranks)
    step = Step(ranks)
    wrapped = DistributedDataParallel(step) if ranks.size > 1 else step
    loss = wrapped(images[mine], texts[mine])
    loss.backward()
    found["chunks under DistributedDataParallel"] = measured(loss, step.towers, ranks)
    return found


def measured(loss, model, ranks):
    mean = loss.detach().clone()
    ranks.sum(mean)
    grads = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in model.named_parameters()}
    return {"loss": mean / ranks.size} | grads


if __name__ == "__main__":
    rank, size, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    torch.save(losses(Ranks()), out)
    dist.destroy_process_group()
