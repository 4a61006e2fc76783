"""Run by each process of test_two_ranks.py: its part of a batch through an AlignStep, and the averaged gradients."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from mmllm.align.config import HeadConfig
from mmllm.align.model import AlignModel, ProjectionHead
from mmllm.align.objectives import InfoNCE, SigLIP
from mmllm.align.qformer_stage import QFormerStage
from mmllm.align.record_keys import stable_id
from mmllm.align.step import AlignStep, Term
from mmllm.blocks.ranks import Ranks
from mmllm.connectors import build_connector
from mmllm.contracts import Objective, Tower
from mmllm.towers.word_embeddings import WordEmbeddingTower

ITEMS, LABELS = 8, "aabcdeff"
CASES = ("plain", "ragged", "tokens", "qformer")


class Pairwise(Objective):
    """Looks at all items at once, over token features of all lengths: only the gathered batch gives the right loss."""

    needs = frozenset({"image.embedding", "image.tokens"})

    def forward(self, batch):
        stream = batch.streams["image"]
        spread = (stream.embedding @ stream.embedding.T).square().mean(1)
        return {"loss": spread + stream.features.tokens.square().mean((1, 2)) * len(batch)}


class Nothing(Tower):
    """Features come ready."""

    modality, hidden_size = "vision", 6


def found(ranks: Ranks, case: str) -> dict[str, torch.Tensor]:
    """Loss (mean over processes) and gradients (averaged) of one step on the process's share of the items."""
    mine = list(range(ranks.rank, ITEMS, ranks.size))
    torch.manual_seed(0)
    if case in ("tokens", "qformer"):
        step, streams, owners = (tokens if case == "tokens" else queries)(mine)
    else:
        step, streams, owners = pooled(mine, case == "ragged")
    labels = [LABELS[k] for k in mine]
    batch = {
        "streams": streams, "owners": owners, "ragged": bool(owners), "ids": [str(k) for k in mine], "labels": labels,
        "boxes": None, "label_ids": torch.tensor([stable_id(x) for x in labels]), "items": torch.tensor(mine),
    }  # fmt: skip
    out = step({"sources": {"s": batch}, "step": 0})
    out["loss"].backward()
    ranks.average_gradients(step.parameters())
    loss = out["loss"].detach().clone()
    ranks.sum(loss)
    return {"loss": loss / ranks.size} | {n: p.grad for n, p in step.named_parameters() if p.grad is not None}


def pooled(mine: list[int], ragged: bool) -> tuple[AlignStep, dict, dict]:
    """Three objectives on pooled heads; ``ragged``: item k has one to three captions, and the last has none."""
    towers = {"image": Nothing(), "text": Nothing()}
    heads = {n: ProjectionHead(6, 4, HeadConfig(hidden_dim=8)) for n in towers}
    model = AlignModel(towers, {n: n for n in towers}, heads, {}, [("image", "text")], 4)  # type: ignore[arg-type]
    objectives = [InfoNCE(["image", "text"]), SigLIP(["image", "text"]), Pairwise()]
    terms = [Term(n, w, ("s",)) for n, w in (("infonce", 1.0), ("siglip", 0.3), ("pairwise", 0.5))]
    want = {"s": {"image": {"embedding", "tokens"}, "text": {"embedding"}}}
    images, texts = torch.randn(ITEMS, 3, 6), torch.randn(ITEMS, 3, 6)
    text, owners = texts[mine, 0], {}
    if ragged:
        rows = [(p, k % 3 + 1) for p, k in enumerate(mine) if k != ITEMS - 1]
        text = torch.cat([texts[mine[p], :n] for p, n in rows])
        owners = {"text": torch.tensor([p for p, n in rows for _ in range(n)]), "image": torch.arange(len(mine))}
    step = AlignStep(model, objectives, terms, want)
    return step, {"image": {"tokens": images[mine]}, "text": {"pooled": text}}, owners


def tokens(mine: list[int]) -> tuple[AlignStep, dict, dict]:
    """Late interaction, with texts that are longer in one process than in the other."""
    towers = {"image": Nothing(), "text": Nothing()}
    connectors = {n: build_connector({"type": "linear", "in_dim": 6, "out_dim": 4}) for n in towers}
    model = AlignModel(towers, {n: n for n in towers}, {}, connectors, [("image", "text")], 4)  # type: ignore[arg-type]
    objective = InfoNCE(["image", "text"], scorer="late_interaction")
    want = {"s": {n: {"token_embedding"} for n in towers}}
    images, texts, lengths = torch.randn(ITEMS, 3, 6), torch.randn(ITEMS, ITEMS, 6), torch.arange(1, ITEMS + 1)
    longest = int(lengths[mine].max())
    mask = torch.arange(longest) < lengths[mine][:, None]
    streams = {"image": {"tokens": images[mine]}, "text": {"tokens": texts[mine, :longest], "mask": mask}}
    return AlignStep(model, [objective], [Term("infonce", 1.0, ("s",))], want), streams, {}


class Words(WordEmbeddingTower):
    """Twelve words; the last ends a text."""

    def preprocessor(self):
        return type("Tokenizer", (), {"eos_token_id": 11})


def queries(mine: list[int]) -> tuple[AlignStep, dict, dict]:
    """Contrast and captions of a query transformer; wrong pairs for its matching are drawn, in each process others."""
    words = Words(12, 4)
    words.weight.data.normal_()
    towers = {"image": Nothing(), "text": words}
    options = {"in_dim": 6, "out_dim": 4, "num_queries": 3, "hidden_dim": 8, "num_heads": 2, "text_dim": "auto"}
    connector = build_connector({"type": "qformer", "text_output": True, **options})
    model = AlignModel(towers, {n: n for n in towers}, {}, {"image": connector}, [("image", "text")], 4)  # type: ignore[arg-type]
    objective = QFormerStage("image", "text", match=0.0, width=5)
    objective.setup(model)
    want = {"s": {n: set(k.split(".")[1] for k in objective.needs if k.startswith(n)) for n in towers}}
    images, ids, lengths = torch.randn(ITEMS, 3, 6), torch.randint(0, 11, (ITEMS, ITEMS)), torch.arange(1, ITEMS + 1)
    ids[5, 0] = ids[0, 0]
    lengths[5] = 1  # says the same as item 0, which another process may have
    longest = int(lengths[mine].max())
    mask = torch.arange(longest) < lengths[mine][:, None]
    streams = {"image": {"tokens": images[mine]}, "text": {"input_ids": ids[mine, :longest], "attention_mask": mask}}
    return AlignStep(model, [objective], [Term("qformer", 1.0, ("s",))], want), streams, {}


if __name__ == "__main__":
    rank, size, store, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    torch.save([found(Ranks(), case) for case in CASES], file)
    dist.destroy_process_group()
