"""Task retrieval: what an align run measured on its dataset, or the same computed anew on other records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmllm.errors import UserError
from mmllm.evaluate.retrieval import retrieval_figures
from mmllm.evaluate.tasks import EvalData
from mmllm.report.figures import Figure, read_figures


def alignment_figures(run: str | Path, data: EvalData) -> list[Figure]:
    """Retrieval, zero-shot and region figures of an align run.

    On the dataset that the run was made from these are the figures that the run wrote at its end, on held-out records.
    On any other dataset retrieval is computed for every held-out file in ``align/`` (named neither train nor regions).

    Raises:
        UserError: no finished align run, or a dataset without such files.
    """
    from mmllm.align.folder import FILE, final_align
    from mmllm.data.models import resolve_dataset

    folder = final_align(run)
    info = json.loads((folder / FILE).read_text(encoding="utf-8"))
    results = folder / "results.json"
    if results.is_file() and info.get("dataset"):
        try:
            same = Path(resolve_dataset(info["dataset"])).resolve() == data.root.resolve()
        except UserError:  # the run's own dataset has been moved or removed
            same = False
        if same and data.limit is None:
            return read_figures(results)
    return computed_figures(folder, info["pairs"], data)


def computed_figures(folder: Path, pairs: list[str], data: EvalData) -> list[Figure]:
    """Retrieval both ways on every held-out file that has media of one of the run's pairs."""
    from mmllm.align.folder import load_align

    model = load_align(folder)
    files = sorted((data.root / "align").glob("*.jsonl"))
    files = [f for f in files if not any(word in f.stem for word in ("train", "regions"))]
    out: list[Figure] = []
    for file in files:
        records = data.records(f"align/{file.name}")
        field = next((k for k in ("image", "audio") if records and k in records[0]), None)
        wanted = "vision" if field == "image" else field
        pair = next((p.split(":") for p in pairs if model.tower(p.split(":")[0]).modality == wanted), None)
        if field and pair:
            out += retrieval_on(model, pair[0], pair[1], records, field, f"retrieval_{file.stem}", data.seed)
    if not out:
        raise UserError(
            "nothing to measure retrieval on", data.root / "align", "give held-out records as align/NAME.jsonl"
        )
    return out


def retrieval_on(
    model: Any, stream: str, text: str, records: list[dict[str, Any]], field: str, name: str, seed: int
) -> list[Figure]:
    """Item -> name among the names of these records, and name -> item."""
    import torch

    from mmllm.data.media import load_audio, load_image

    first = {r["id"]: r["text"] if isinstance(r["text"], str) else r["text"][0] for r in records}
    labels = [str(r.get("label") or first[r["id"]]) for r in records]
    names = sorted(set(labels))
    truth = [names.index(x) for x in labels]
    if field == "image":
        media: list[Any] = [load_image(r[field]) for r in records]
    else:
        rate = int(getattr(model.tower(stream).preprocessor(), "sampling_rate", 16000))
        media = [load_audio(r[field], rate) for r in records]
    sim = model.embed(stream, media) @ model.embed(text, names).T
    positive = torch.zeros(len(names), len(records), dtype=torch.bool)
    positive[torch.tensor(truth), torch.arange(len(records))] = True
    clusters = [str(r.get("group") or label) for r, label in zip(records, labels, strict=True)]
    both = retrieval_figures(name, sim, truth, clusters=clusters, seed=seed)
    return both + retrieval_figures(f"{name}_from_text", sim.T, positive, seed=seed)
