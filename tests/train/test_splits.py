"""How a batch is split over accumulation steps changes no gradient: the loss is a mean over all its answer tokens."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_mm import tiny_llm, tiny_towers

from mmllm.contracts import StepHook
from mmllm.data.chat_batches import ChatBatches
from mmllm.data.conversations import IGNORE, assemble, collate
from mmllm.data.packing import collate_packed
from mmllm.model import build_model
from mmllm.train.params import set_trainable
from mmllm.train.run import RunFolder
from mmllm.train.section import TrainSection
from mmllm.train.trainer import MMTrainer

RNG = np.random.default_rng(0)
PICTURES = [Image.fromarray(RNG.integers(0, 255, (32, 32, 3), np.uint8)) for _ in range(3)]


def turn(role, *parts):
    parts = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return {"role": role, "content": parts}


def talk(question, answer, *pictures):
    return {"messages": [turn("user", *pictures, question), turn("assistant", answer)]}


# Answers of 1 to 90 tokens, media and none, branches, a document: what a mean of means would weigh wrongly.
RECORDS = [
    talk("cat?", "no"),
    talk("What is in the picture?", "a dog, a bell. " * 9, PICTURES[0]),
    talk("cat?", "yes", PICTURES[1]),
    {"messages": [turn("document", "Where is it? ", PICTURES[2], "a cat. " * 6)]},
    talk("Where?", "<box>1,22,333,999</box>"),
    {
        "messages": [turn("user", PICTURES[0])],
        "branches": [
            [turn("user", "cat?"), turn("assistant", "no")],
            [turn("user", "What?"), turn("assistant", "a dog, a bell")],
        ],
    },
    {"messages": [*talk("cat?", "no")["messages"], *talk("dog?", "yes, a dog")["messages"]]},
    talk("yes?", "no, no, no"),
]  # fmt: skip


class Gradient(StepHook):
    """Keeps the gradient that the optimizer sees."""

    def before_optimizer_step(self, model, step):
        self.seen = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def gradient(folder, splits, power=0.0, packed=False):
    """The gradient of one step over all records, taken in pieces of so many by the trainer; and its loss."""
    torch.manual_seed(0)
    connectors = {"vision": {"type": "mlp", "hidden_dim": 16}}
    model, processor = build_model(tiny_llm(), tiny_towers()[0], connectors=connectors, dtype=torch.float32)
    made = ChatBatches(
        RECORDS, processor, lambda media: processor.media_inputs([m for _, m in media], [])[0] if media else {}, len,
        len(RECORDS), 0, length_normalization=power,
    )  # fmt: skip

    def batch(step, rank, world):
        start = sum(splits[:step])
        rows = [assemble(made.conversation(i), processor) for i in range(start, start + splits[step])]
        return made.finished(dict(collate_packed(rows) if packed else collate(rows, processor.pad_id)), rows)

    section = TrainSection.model_validate(
        {"max_steps": 1, "gradient_accumulation_steps": len(splits), "max_grad_norm": 0.0, "threads": 1,
         "logging_steps": 1, "save_strategy": "no", "warmup_steps": 0}
    )  # fmt: skip
    hook = Gradient()
    groups = set_trainable(model, [("llm", model.language_model.parameters(), None),
                                   ("connector", model.vision_connector.parameters(), None)])  # fmt: skip
    run = RunFolder.open(folder, "toy", section, resume=False)
    trainer = MMTrainer(model, batch, groups, section, run, hooks=[hook], unpack_batch=True)
    loss = trainer.fit()["loss"]
    return hook.seen, loss


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return {power: gradient(folder / str(power), [8], power) for power in (0.0, 0.7)}


@pytest.mark.parametrize("power", [0.0, 0.7])
@pytest.mark.parametrize("splits", [[1] * 8, [2] * 4, [4, 4], [5, 3]], ids=str)
def test_splits_give_the_gradient_of_the_whole_batch(whole, tmp_path, splits, power):
    one, loss = whole[power]
    other, split_loss = gradient(tmp_path / "run", splits, power)
    assert set(one) == set(other) and any("vision_connector" in n for n in one)
    assert split_loss == pytest.approx(loss, rel=1e-4)
    for name, grad in one.items():
        torch.testing.assert_close(other[name], grad, rtol=1e-3, atol=1e-6 + 1e-4 * float(grad.abs().max()), msg=name)


def test_packed_rows_give_it_too(whole, tmp_path):
    other, _ = gradient(tmp_path / "run", [3, 5], packed=True)
    for name, grad in whole[0.0][0].items():
        torch.testing.assert_close(other[name], grad, rtol=1e-3, atol=1e-6 + 1e-4 * float(grad.abs().max()), msg=name)


def test_a_mean_of_means_would_be_another_gradient():
    """The records do tell the two apart: the smallest has 2 learned tokens, the largest more than 50."""
    _, processor = build_model(tiny_llm(), tiny_towers()[0], dtype=torch.float32)
    made = ChatBatches(RECORDS, processor, lambda m: {}, len, 8, 0)
    counts = [sum(x != IGNORE for x in assemble(made.conversation(i), processor).labels) for i in range(8)]
    assert min(counts) <= 3 and max(counts) > 50
