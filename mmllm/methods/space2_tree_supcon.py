"""SPACE-2: Tree-Structured Semi-Supervised Contrastive Pre-training (arXiv 2209.06638).

slug: space2-tree-supcon
number: 66
shelf: 1
kind: objective
config: "objectives: [{type: tree_supcon, options: {streams: [image], fields: [meta.category, meta.subgroup, label]}}]"
left_out: the dialogue encoder and its masked-word loss; items without a tree may stand in the same batch instead
  of in one of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.align.item_rows import item_losses, stacked_rows
from mmllm.blocks.tiled_contrast import contrast
from mmllm.contracts import AlignBatch, Objective
from mmllm.errors import UserError, unknown
from mmllm.registry import register
from mmllm.report.figures import Figure

if TYPE_CHECKING:
    from mmllm.align.config import MeasureConfig
    from mmllm.train.align import AlignStage

FIELDS = ("label", "group", "id", "meta.FIELD")
Path = Sequence[Any]  # node names from the top of the tree down, None where a level is missing


def spans(depth: int) -> list[tuple[int, int]]:
    """The ways to look at a tree: its levels, its edges, its longer paths, as (first, one past the last) levels."""
    return [(start, start + length) for length in range(1, depth + 1) for start in range(depth - length + 1)]


def tree_scores(trees: Sequence[Sequence[Path]], depth: int) -> Tensor:
    """Share of what two trees have in common, |A and B| / |A or B|, for each of ``spans(depth)``; [V, B, B].

    A tree is the list of its paths. A path with a missing level has no part there; of two empty sets the share is 0.
    """
    out = []
    for start, stop in spans(depth):
        sets = [{tuple(map(str, p[start:stop])) for p in tree if None not in p[start:stop]} for tree in trees]
        number = {part: n for n, part in enumerate(sorted(set().union(*sets)))}
        held = torch.zeros(len(sets), max(len(number), 1))
        for row, parts in enumerate(sets):
            held[row, [number[p] for p in parts]] = 1
        both, size = held @ held.T, held.sum(1)
        out.append(both / (size[:, None] + size[None] - both).clamp(min=1))
    return torch.stack(out)


@register("objective", "tree_supcon")
class TreeSupCon(Objective):
    """Contrast with soft targets by how much of their trees two items share, in a subspace for each part of the tree.

    Rows are the embeddings of the streams. Of one field it is the supervised contrastive loss; with the field ``id``,
    or for items that have no tree, NT-Xent.

    Args:
        streams: whose rows are contrasted; of a single one a second view ``STREAM@tree`` is made.
        fields: the levels from the top down: ``label``, ``group``, ``id`` or ``meta.FIELD`` of an item; a record lacks
            those that it does not have.
        tree: instead of ``fields``, a field of ``meta`` with a list of paths, each of ``depth`` names (or None).
        depth: levels of ``tree``.
        temperature: of the softmax.
        subspace: width of each subspace; None: that of the embeddings.
    """

    def __init__(
        self,
        streams: Sequence[str],
        fields: Sequence[str] = (),
        tree: str | None = None,
        depth: int = 4,
        temperature: float = 0.07,
        subspace: int | None = None,
    ):
        super().__init__()
        where = "objective 'tree_supcon'"
        for field in fields:
            if field not in FIELDS and not field.startswith("meta."):
                raise unknown("field", field, FIELDS, where)
        if bool(fields) == (tree is not None):
            raise UserError("give either fields or tree", where)
        if not streams or temperature <= 0 or depth < 1:
            raise UserError("it takes a stream, a temperature above 0 and a depth of 1 or more", where)
        self.rows = list(streams)
        if len(self.rows) == 1:
            view = f"{self.rows[0]}@tree"
            self.streams = {view: {"of": self.rows[0]}}
            self.rows.append(view)
        self.fields, self.tree, self.depth = list(fields), tree, len(fields) or depth
        self.temperature, self.subspace = temperature, subspace
        self.head: nn.Linear | None = None
        needed = {"groups": "group", "labels": "label"}
        own = {n for n, f in needed.items() if f in fields} | {f for f in fields if f.startswith("meta.")}
        own |= set() if tree is None else {f"meta.{tree}"}
        self.needs = frozenset(own | {f"{s}.embedding" for s in self.rows})

    def setup(self, model: Any) -> None:
        width = model.embedding_dim
        self.head = nn.Linear(width, len(spans(self.depth)) * (self.subspace or width))

    def trees(self, batch: AlignBatch) -> list[list[Path]]:
        """Each item's paths; empty for an item without a tree."""
        meta = batch.extras.get("meta") or [{} for _ in range(len(batch))]
        if self.tree is not None:
            return [list(m.get(self.tree) or []) for m in meta]
        known = {"label": batch.labels, "group": batch.groups, "id": batch.ids}
        columns = [known[f] if f in known else [m.get(f[5:]) for m in meta] for f in self.fields]
        return [[path] for path in zip(*(c or [None] * len(meta) for c in columns))]

    def forward(self, batch: AlignBatch) -> dict[str, Tensor]:
        assert self.head is not None
        rows, owner = stacked_rows(batch, self.rows)
        scores = tree_scores(self.trees(batch), self.depth).to(rows.device)
        scores.diagonal(dim1=1, dim2=2).fill_(1.0)  # the other view of an item is its own
        parts = torch.tanh(self.head(rows)).unflatten(-1, (len(scores), -1))
        each = soft_supcon(parts.transpose(0, 1), scores[:, owner][:, :, owner], self.temperature)
        return item_losses(each.mean(0), owner, len(batch))


def soft_supcon(rows: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """``- sum_j w_ij log softmax_j(z_i z_j / T)`` over the others, w = scores / their sum; [V, R] (equation 5).

    Args:
        rows: [V, R, D], of V subspaces, of any length; scores: [V, R, R].
    """
    count = rows.shape[1]

    def others(i: slice, j: slice) -> Tensor:
        return torch.arange(count)[i][:, None] != torch.arange(count)[j][None]

    return torch.stack(
        [
            contrast(z, z, scale=1 / temperature, target_fn=lambda i, j, s=s: s[i, j], allow_fn=others)
            for z, s in zip(F.normalize(rows.float(), dim=-1), scores)
        ]
    )


@register("measure", "tree_order")
def tree_order(
    stage: AlignStage, measure: MeasureConfig, records: list[dict[str, Any]], fields: Sequence[str] = ("label",)
) -> list[Figure]:
    """``NAME``: Spearman's correlation of cosine and mean tree score over all pairs of items of the first stream.

    Args:
        fields: the levels of the tree from the top down, as in the objective.
    """
    from mmllm.evaluate.correlation import spearman
    from mmllm.evaluate.stats import derangement
    from mmllm.train.align_measures import class_of, stream_rows

    rows, held = stream_rows(stage, measure, measure.streams[0], records)
    if len(rows) < 3:
        return [Figure(measure.name, None, note="fewer than three items")]
    paths = [[[class_of(records[i], f.removeprefix("meta.")) or None for f in fields]] for i in held]
    truth = tree_scores(paths, len(fields)).mean(0)
    pairs = tuple(torch.triu_indices(len(rows), len(rows), 1))
    unit = F.normalize(rows.float(), dim=-1)
    swapped = unit[derangement(len(unit), stage.config.train.seed)]
    own, other = ((u @ u.T)[pairs].numpy() for u in (unit, swapped))
    value, control = (spearman(x, truth[pairs].numpy()) for x in (own, other))
    note = f"Spearman of cosine and tree score over {len(pairs[0]):,} pairs"
    return [Figure(measure.name, value, "higher", n=len(rows), unit="", control=control, note=note)]
