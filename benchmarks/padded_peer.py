"""The two sides of ``tune_step.py``: ours, and a plain transformers Trainer, on the same LLaVA model and records."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Trainer,
    TrainingArguments,
)

from mmllm.config import parse_config
from mmllm.data.conversations import IGNORE, Encoded, encode_conversation, join_messages
from mmllm.data.models import resolve_dataset, resolve_model
from mmllm.data.records import read_records
from mmllm.data.starter_sets import shuffled
from mmllm.train.chat_data import ChatData
from mmllm.train.chat_media import ChatMedia
from mmllm.train.run import RunFolder
from mmllm.train.trainer import MMTrainer
from mmllm.train.tune_config import TuneConfig
from mmllm.train.tune_model import fast_attention, make_batches, make_model
from mmllm.train.tune_parts import adapt

# SmolLM2's marks, with pictures among the words.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'image' %}<image>"
    "{% else %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class Size:
    """What is measured: the tower, conversations of an epoch, of a batch, and of the packing rows."""

    layers: int = 12
    width: int = 768
    items: int = 16
    batch: int = 8
    planned: int = 2500
    data: str = "starter:full"


SMOKE = Size(layers=2, width=64, items=8, batch=4, planned=200, data="starter:fast")


def forget_precision() -> None:
    """accelerate remembers one mixed precision for a whole process; each side has its own."""
    AcceleratorState._reset_state(reset_partial_state=True)


def make_llava(folder: Path, size: Size) -> None:
    """Writes the model that both sides start from."""
    torch.manual_seed(0)
    llm_folder = resolve_model("starter:smollm2-135m-instruct")
    tokenizer: Any = AutoTokenizer.from_pretrained(llm_folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    vision = CLIPVisionConfig(
        image_size=224, patch_size=16, hidden_size=size.width, num_hidden_layers=size.layers,
        num_attention_heads=size.width // 64, intermediate_size=4 * size.width,
    )  # fmt: skip
    text = AutoConfig.from_pretrained(llm_folder)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
    )  # fmt: skip
    model: Any = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    llm: Any = AutoModelForCausalLM.from_pretrained(llm_folder, dtype=torch.bfloat16)
    model.model.language_model.load_state_dict(llm.model.state_dict())
    model.resize_token_embeddings(len(tokenizer))
    model.tie_weights()
    model.save_pretrained(folder)
    LlavaProcessor(CLIPImageProcessor(), tokenizer, patch_size=16, vision_feature_select_strategy="default",
                   num_additional_image_tokens=1, chat_template=TEMPLATE).save_pretrained(folder)  # fmt: skip


def starter_records(data: str, count: int | None) -> list[dict[str, Any]]:
    """So many of the starter's conversations about pictures, evenly from its training set; None: all."""
    files = [resolve_dataset(data) / f"tune/{name}.jsonl" for name in ("scenes", "interleaved")]
    # Mixed: long rows that stand together would need less padding than they do in training.
    found = shuffled([r for file in files for r in read_records(file)], 0)
    return found if count is None else found[:: len(found) // count][:count]


def as_turns(record: dict[str, Any]) -> dict[str, Any]:
    """All questions of a record as turns of one conversation."""
    first, *more = record["branches"]
    return {"id": record["id"], "messages": [*join_messages(record["messages"], first), *(m for b in more for m in b)]}


class Ours:
    """Our side, with the parts of ``mmllm pretrain`` put together as it does."""

    def __init__(self, llava: Path, records: list[dict[str, Any]], size: Size, folder: Path):
        train = {"connector": "full", "llm": "none", "num_train_epochs": 1, "per_device_train_batch_size": size.batch,
                 "learning_rate": 1e-3, "logging_steps": 500}  # fmt: skip
        values = {"init": str(llava), "data": "records", "dtype": "bfloat16", "branches_per_row": None,
                  "max_length": 2048, "train": train}  # fmt: skip
        self.config, self.records, self.folder, self.runs = parse_config(values, TuneConfig), records, folder, 0
        self.data = ChatData(records, [r["id"] for r in records], [0] * len(records), ["records"])
        self.model, self.processor = make_model(self.config, torch.bfloat16)
        fast_attention(self.model, self.config.model_copy(update={"max_length": 1024}))
        self.groups = adapt(self.model, self.config)

    def epoch(self, cache: Path) -> None:
        """Features, batches and all steps of an epoch; and the checkpoint that ends it."""
        os.environ["MMLLM_CACHE"] = str(cache)
        forget_precision()
        self.runs += 1
        media = ChatMedia(self.model, self.processor, self.records, self.config)
        batches, items = make_batches(self.config, self.data, self.processor, media)
        run = RunFolder.open(self.folder / f"run{self.runs}", "pretrain", self.config)
        trainer = MMTrainer(
            self.model, batches, self.groups, self.config.train, run, items=items, unpack_batch=True, save_steps=10**6
        )
        trainer.fit()

    def rows(self) -> list[Encoded]:
        return [encode_conversation(r, self.processor) for r in self.records]


class Theirs:
    """A plain Trainer on padded batches."""

    def __init__(self, llava: Path, records: list[dict[str, Any]], size: Size, folder: Path, processor: Any):
        self.model: Any = LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.bfloat16)
        self.model.requires_grad_(False)
        self.model.model.multi_modal_projector.requires_grad_(True)
        self.pictures = CLIPImageProcessor.from_pretrained(llava)
        self.pad, self.image = processor.pad_id, (processor.image_token_id, self.model.config.image_token_id)
        self.rows = [encode_conversation(as_turns(r), processor) for r in records]
        self.arguments = TrainingArguments(
            str(folder / "trainer"), per_device_train_batch_size=size.batch, num_train_epochs=1, learning_rate=1e-3,
            bf16=True, use_cpu=not torch.cuda.is_available(), save_strategy="no", report_to="none", disable_tqdm=True,
            remove_unused_columns=False, logging_strategy="no",
        )  # fmt: skip

    def collate(self, rows: list[Encoded]) -> dict[str, Tensor]:
        """Padded on the right; pictures are read here."""
        from PIL import Image

        longest = max(len(r.input_ids) for r in rows)

        def padded(values: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([v + [fill] * (longest - len(v)) for v in values])

        files = [source for r in rows for _, source in r.media]
        ours, own = self.image
        ids = padded([r.input_ids for r in rows], self.pad)
        pixels: Any = self.pictures([Image.open(f).convert("RGB") for f in files], return_tensors="pt")
        return {
            "input_ids": ids.masked_fill(ids == ours, own),
            "labels": padded([r.labels for r in rows], IGNORE),
            "attention_mask": padded([[1] * len(r.input_ids) for r in rows], 0),
            "pixel_values": pixels["pixel_values"].to(torch.bfloat16),
        }

    def epoch(self) -> None:
        forget_precision()
        rows: Any = self.rows
        Trainer(self.model, self.arguments, self.collate, train_dataset=rows).train()


def check_same(ours: Ours, theirs: Theirs) -> None:
    """Both models give one loss on conversations of one question, where the two kinds of rows are the same.

    Raises:
        RuntimeError: they don't.
    """
    rows = [encode_conversation({**r, "branches": r["branches"][:1]}, ours.processor) for r in ours.records[:2]]
    batch = theirs.collate(rows)
    own = {k: v for k, v in batch.items() if k != "input_ids"}
    own["pixel_values"] = own["pixel_values"].float()
    ids = batch["input_ids"].masked_fill(batch["input_ids"] == theirs.image[1], theirs.image[0])
    with torch.no_grad():
        losses = [float(theirs.model.eval()(**batch).loss), float(ours.model.eval()(input_ids=ids, **own).loss)]
    if abs(losses[0] - losses[1]) > 0.03 * losses[0]:
        raise RuntimeError(f"the two models differ: {losses}")
