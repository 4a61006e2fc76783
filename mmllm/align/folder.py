"""An aligned model as a folder: one folder per tower, heads.safetensors, one folder per connector, align.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from mmllm.align.config import HeadConfig
from mmllm.align.model import MAX_LOGIT_SCALE, AlignModel, ProjectionHead
from mmllm.connectors import load_connector_folder
from mmllm.contracts import Connector, Tower
from mmllm.errors import UserError, unknown
from mmllm.towers import load_tower, save_tower

FILE = "align.json"


def save_align(model: AlignModel, folder: str | Path, info: dict[str, Any]) -> None:
    """Writes the model; ``info`` goes into ``align.json`` (vocabulary, sources).

    Towers of kind ``word_embeddings`` belong to an LLM and are not written, nor are the streams that only use them.
    """
    folder = Path(folder)
    own = {k: t for k, t in model.towers.items() if t.to_config()["model_type"] != "word_embeddings"}  # type: ignore[operator]
    for name, tower in own.items():
        save_tower(tower, folder / name)  # type: ignore[arg-type]
    heads = {n: h for n, h in model.heads.items() if n in model.tower_of}  # those of derived streams were for training
    state = {
        f"heads.{n}.{k}": v.detach().cpu().contiguous() for n, h in heads.items() for k, v in h.state_dict().items()
    }
    for name in ("logit_scale", "logit_bias"):
        state |= {f"{name}.{k}": v.detach().cpu() for k, v in getattr(model, name).items()}
    save_file(state, str(folder / "heads.safetensors"), metadata={"format": "pt"})
    for name in (n for n in model.connectors if n in model.tower_of):
        connector: Any = model.connectors[name]
        connector.save_pretrained(folder / f"connector_{name}")
    streams = {
        name: {
            "modality": model.tower(name).modality,
            "tower": owner,
            "head": head.model_dump() if (head := model.head_config(name)) is not None else None,
            "connector": f"connector_{name}" if name in model.connectors else None,
            "image_size": model.image_size.get(name),
        }
        for name, owner in model.tower_of.items()
        if owner in own
    }
    data = {"embedding_dim": model.embedding_dim, "max_logit_scale": model.max_logit_scale, "streams": streams}
    data |= {"pairs": list(model.logit_scale), **info}
    (folder / FILE).write_text(json.dumps(data, indent=2, ensure_ascii=False), encoding="utf-8")


def final_align(run: str | Path) -> Path:
    """The folder with ``align.json``: the one given, or ``final`` inside a run folder.

    Raises:
        UserError: neither holds an aligned model.
    """
    for folder in (Path(run), Path(run) / "final"):
        if (folder / FILE).is_file():
            return folder
    raise UserError("no aligned model here", run, "give the run folder of a finished `mmllm align`")


def load_align(run: str | Path) -> AlignModel:
    """The model of a finished align run, in eval mode.

    Raises:
        UserError: not an aligned model.
    """
    folder = final_align(run)
    info = json.loads((folder / FILE).read_text(encoding="utf-8"))
    streams, dim = info["streams"], info["embedding_dim"]
    towers: dict[str, Tower] = {}
    for spec in streams.values():
        if spec["tower"] not in towers:
            towers[spec["tower"]] = load_tower(str(folder / spec["tower"]), spec["modality"])
    heads = {
        name: ProjectionHead(towers[s["tower"]].pooled_size, dim, HeadConfig(**s["head"]))
        for name, s in streams.items()
        if s["head"]
    }
    connectors = {n: load_connector_folder(folder / s["connector"]) for n, s in streams.items() if s["connector"]}
    pairs = [tuple(p.split(":")) for p in info["pairs"]]
    model = AlignModel(towers, {n: s["tower"] for n, s in streams.items()}, heads, connectors, pairs, dim)  # type: ignore[arg-type]
    model.image_size = {n: s["image_size"] for n, s in streams.items() if s["image_size"]}
    model.max_logit_scale = info.get("max_logit_scale", MAX_LOGIT_SCALE)
    state = load_file(str(folder / "heads.safetensors"))
    missing = [k for k in state if k not in model.state_dict()]
    if missing:
        raise UserError(f"unexpected weight '{missing[0]}'", folder / "heads.safetensors")
    model.load_state_dict(state, strict=False)
    return model.eval()


def load_connector(run: str | Path, modality: str) -> tuple[Connector, dict[str, Any]]:
    """The connector that region alignment trained for ``vision`` (or ``image``) or ``audio``.

    Returns:
        The connector and ``{"stream", "tower" (folder), "image_size", "vocabulary"}``.

    Raises:
        UserError: the run aligned no connector for this modality.
    """
    folder = final_align(run)
    info = json.loads((folder / FILE).read_text(encoding="utf-8"))
    wanted = {"image": "vision"}.get(modality, modality)
    if wanted not in ("vision", "audio"):
        raise unknown("modality", modality, ["vision", "image", "audio"])
    for name, spec in info["streams"].items():
        if spec["modality"] == wanted and spec["connector"]:
            about = {"stream": name, "tower": str(folder / spec["tower"]), "image_size": spec["image_size"]}
            return load_connector_folder(folder / spec["connector"]), {
                **about,
                "vocabulary": info.get("vocabulary", {}),
            }
    raise UserError(f"no {modality} connector in this align run", folder, "add a region_align objective to its config")
