"""The loss of a tune run on conversations that it does not train on."""

from __future__ import annotations

from typing import Any

from mmllm.data.chat_batches import ChatBatches

ROWS = 8  # conversations computed together


class HeldOutLoss:
    """``HeldOutLoss(...)() -> float``: the mean loss over the answer tokens of the held-out conversations.

    Each shows the same branches every time, so that values of different steps compare. Rows are padded, not packed; a
    remainder that fills no batch of eight is left out, unless there are fewer than eight.

    Args:
        records: their media must be among those of ``media``.
    """

    def __init__(self, model: Any, records: list[dict[str, Any]], processor: Any, media: Any, config: Any):
        self.model = model
        own = (config.train.seed, config.branches_per_row, config.max_length, config.length_normalization)
        self.batches = ChatBatches(records, processor, media.inputs, media.audio_tokens, ROWS, *own)

    def __call__(self) -> float:
        device = self.model.get_input_embeddings().weight.device
        total = weight = 0.0
        for number in range(len(self.batches.records) // self.batches.batch_size):
            batch = self.batches(number)
            inputs = {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}
            total += float(self.model(**inputs).loss) * float(batch["num_items"])
            weight += float(batch["num_items"])
        return total / max(weight, 1e-9)
