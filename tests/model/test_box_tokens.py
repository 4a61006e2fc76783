"""Box tokens: ordinary text in two tokens, embedded in the code of the visual tokens, and kept by a saved model."""

import pytest
import torch
from tiny_mm import tiny_model

from mmllm.blocks.box_code import box_axes, waves
from mmllm.errors import UserError
from mmllm.model import load_model
from mmllm.model.box_tokens import add_box_tokens, corner_tokens, snap_boxes


@pytest.fixture
def tiny_mm():
    return tiny_model()


def test_boxes_in_text_move_to_the_middle_of_their_bins():
    assert snap_boxes("The cat is at <box>0,249, 250,999</box>.", 4) == "The cat is at <box>125,125,375,874</box>."
    again = snap_boxes("<box>10,20,700,999</box>", 16)
    assert snap_boxes(again, 16) == again
    assert snap_boxes("no <box> here, 1,2</box>", 16) == "no <box> here, 1,2</box>"


def test_every_corner_has_its_own_text():
    names = corner_tokens(16)
    assert len(set(names)) == 2 * 16 * 16


def test_a_box_is_two_tokens_and_reads_as_before(tiny_mm):
    model, processor = tiny_mm
    ids = processor.text_ids("Here: <box>10,20,700,999</box>.")
    add_box_tokens(model, processor, 8)
    assert len(processor.text_ids("no box, 62,")) > 5  # numbers of other texts stay what they were
    text = snap_boxes("Here: <box>10,20,700,999</box>.", 8)
    found = processor.text_ids(text)
    assert len(found) < len(ids)
    box = [i for i in found if processor.tokenizer.convert_ids_to_tokens(i) in corner_tokens(8)]
    assert len(box) == 2
    assert processor.decode_text(found).replace(" ", "") == text.replace(" ", "")
    messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "<box>10,20,700,999</box>"}]
    assert "<box>62,62,687,937</box>" in processor.render(messages)


def test_the_rows_are_words_in_the_code_of_region_box(tiny_mm):
    model, processor = tiny_mm
    before = model.get_input_embeddings().weight.detach().clone().float()
    count = len(processor.tokenizer)
    add_box_tokens(model, processor, 4)
    after = model.get_input_embeddings().weight.detach().float()
    assert torch.equal(after[:count], before[:count])  # all others bit for bit
    centre = before[:count].mean(0)
    length = (before[:count] - centre).norm(dim=-1).mean()
    axes = box_axes(before.shape[1])
    # x is bin 2, y is bin 1 of four: 0.625 and 0.375 of 999
    for name, k in (("<box>624,375,", 0), ("624,375</box>", 2)):
        row = after[processor.tokenizer.convert_tokens_to_ids(name)]
        found = torch.einsum("kwd,d->kw", axes, (row - centre) / length)
        wanted = torch.zeros(4, 6)
        wanted[k], wanted[k + 1] = waves(torch.tensor(0.625)) / 2**0.5, waves(torch.tensor(0.375)) / 2**0.5
        torch.testing.assert_close(found, wanted, atol=0.02, rtol=0)


def test_a_saved_model_keeps_its_box_tokens(tiny_mm, tmp_path):
    model, processor = tiny_mm
    add_box_tokens(model, processor, 4)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, reader = load_model(tmp_path, torch.float32)
    assert reader.box_bins == 4
    text = "<box>125,125,624,874</box>"
    assert reader.text_ids(text) == processor.text_ids(text) and len(reader.text_ids(text)) == 2
    ids = torch.tensor([reader.text_ids(text)])
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits.float(), atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="box tokens already"):
        add_box_tokens(again, reader, 4)
