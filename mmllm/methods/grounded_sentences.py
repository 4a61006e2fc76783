"""Learning semantic sentence representations from visually grounded language without lexical knowledge (arXiv 1903.11393).

slug: grounded-sentences
number: 33
shelf: 1
kind: objective
config: "objectives: [{type: vse_hinge, options: {pair: [image, text]}}]  # with text.tower: {model: 'tiny:char_gru'}"
left_out: word-based and pretrained text encoders, and the sentence similarity sets (STS); snapshots at the minima of a
  cyclic learning rate are a hook, and train.lr_scheduler_type, cosine_with_restarts, goes down to 0 instead of 1e-6.
differs: the released code lets padding take part in the attention.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmllm.towers.char_gru  # noqa: F401  (the text encoder of section 3.1)
from mmllm.align.objectives import PairObjective
from mmllm.blocks.tiled_contrast import contrast
from mmllm.contracts import AlignBatch, StepHook
from mmllm.errors import UserError
from mmllm.registry import register
from mmllm.report.figures import Figure


@register("objective", "vse_hinge")
class VSEHinge(PairObjective):
    """Mean over all B x B pairs of max(0, margin + s_ij - s_ii) and max(0, margin + s_ji - s_ii), own pairs 0 (eq. 4).

    Args:
        margin: by which the right pair's cosine shall be above each other one.
    """

    def __init__(self, pair: Sequence[str], same_label: bool = True, margin: float = 0.2, scorer: Any = "cosine"):
        super().__init__(pair, same_label, scorer)
        if margin <= 0:
            raise UserError(f"margin must be above 0 (got {margin})", "objective 'vse_hinge'")
        self.margin = margin

    def loss(self, rows: Any, cols: Any, batch: AlignBatch, **how: Any) -> Tensor:
        value = contrast(rows, cols, divergence="hinge", margin=self.margin, **how)
        count = len(cols if isinstance(cols, Tensor) else cols[0]) * (1 if batch.ranks is None else batch.ranks.size)
        # The base takes the mean of both directions, the paper their sum; a learned temperature has no part in it.
        return 2 * value / count + 0.0 * batch.logit_scale[self.pair_name]


@register("step_hook", "snapshots")
class Snapshots(nn.Module, StepHook):
    """Keeps what trains as it was after every ``every`` steps: the minima of a cyclic learning rate (section 3.3).

    With ``train.lr_scheduler_type: cosine_with_restarts`` and ``lr_scheduler_kwargs: {num_cycles: C}`` a cycle is a
    C-th of the steps; the end of the last one is the trained model itself. Asked by the measure ``ensemble_pairs``.

    Args:
        every: steps of a cycle.
        count: snapshots that are kept, the last ones; their number with the trained model is one more.
    """

    taken: Tensor

    def __init__(self, every: int, count: int = 3):
        super().__init__()
        if every < 1 or count < 1:
            raise UserError(f"every and count must be at least 1 (got {every}, {count})", "step hook 'snapshots'")
        self.every, self.count = every, count
        self.register_buffer("taken", torch.zeros((), dtype=torch.long))
        self.live: list[nn.Parameter] = []

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "groups":
            super().__setattr__(name, value)
            return
        # What trains is told before a checkpoint is read: the buffers must be there by then.
        self.__dict__["groups"] = value
        self.__dict__["live"] = [p for _, params in sorted(value.items()) for p in params]
        for i, p in enumerate(self.live):
            self.register_buffer(f"kept_{i}", p.detach().new_zeros(self.count, *p.shape))

    @torch.no_grad()
    def before_forward(self, model: nn.Module, batch: Any, step: int) -> None:
        number = step // self.every
        if step % self.every or number == 0 or int(self.taken) >= number:
            return
        for i, p in enumerate(self.live):
            kept = getattr(self, f"kept_{i}")
            kept[(number - 1) % self.count] = p.detach().to(kept)
        self.taken.fill_(number)

    @contextmanager
    def as_it_was(self, which: int) -> Iterator[None]:
        """Within, what trains has the weights of a snapshot, 0 to ``len(self) - 1``."""
        now = [p.detach().clone() for p in self.live]
        with torch.no_grad():
            for i, p in enumerate(self.live):
                p.copy_(getattr(self, f"kept_{i}")[which])
        try:
            yield
        finally:
            with torch.no_grad():
                for p, old in zip(self.live, now):
                    p.copy_(old)

    def __len__(self) -> int:
        """Snapshots that are kept."""
        return min(int(self.taken), self.count)

    def __bool__(self) -> bool:
        return True


@register("measure", "ensemble_pairs")
def ensemble_pairs(stage: Any, measure: Any, records: list[dict[str, Any]]) -> list[Figure]:
    """Retrieval as in ``pairs``, by the sum of the unit embeddings of all snapshots and of the trained model.

    Raises:
        UserError: no phase has the hook ``snapshots``.
    """
    from mmllm.evaluate.ranking import pair_figures
    from mmllm.train.align_measures import stream_rows

    hooks = [h for step in stage.steps.values() for h in step.hooks if isinstance(h, Snapshots)]
    if not hooks:
        raise UserError("no phase has the hook 'snapshots'", f"measure '{measure.name}'", "add it to a phase's hooks")
    hook, keys, sums = hooks[-1], {}, {}
    towers = [stage.model.tower(s) for s in measure.streams]
    moved = {id(p) for p in hook.live}
    training = [t for t in towers if any(id(p) in moved for p in t.parameters())]
    for which in [*range(len(hook)), None]:
        with ExitStack() as inside:
            if which is not None:
                inside.enter_context(hook.as_it_was(which))
                if training:
                    inside.enter_context(stage.frozen.changing(training))  # features of other weights are not kept
            for stream in measure.streams:
                rows, held = stream_rows(stage, measure, stream, records)
                by_label = measure.by == "label"
                keys[stream] = [str(records[i].get("label") or records[i]["id"]) if by_label else i for i in held]
                sums[stream] = sums.get(stream, 0) + F.normalize(rows, dim=-1)
    return pair_figures(measure.name, {s: F.normalize(x, dim=-1) for s, x in sums.items()}, keys)
