"""Tiling: the grid is LLaVA-NeXT's, tokens are counted exactly for every size, and nobody else's picture matters."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_mm import tiny_llm, tiny_towers
from transformers.image_processing_utils import select_best_resolution

from mmllm.data.anyres import Tiling, View, views_of
from mmllm.data.conversations import collate, encode_conversation
from mmllm.data.media import load_image
from mmllm.data.packing import collate_packed
from mmllm.decode import Decoder, Request
from mmllm.errors import UserError
from mmllm.model import build_model, load_model
from mmllm.model.loading import add_injector, add_tiling
from mmllm.model.tiling import TileRows
from mmllm.serve.export_llava import check_parts
from mmllm.serve.folder import check_servable

SIDE = 32  # of the tiny tower's pictures
SIZES = [(1, 1), (5, 300), (300, 5), (32, 32), (33, 32), (64, 64), (40, 90), (97, 31), (640, 480), (100, 1000)]


def picture(size, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8))


def model_of(max_tiles=6, connector=None, **options):
    torch.manual_seed(0)
    made = build_model(
        tiny_llm(), tiny_towers()[0], connectors={"vision": connector or {"type": "mlp", "hidden_dim": 16}},
        dtype=torch.float32,
    )  # fmt: skip
    add_tiling(*made, max_tiles=max_tiles, **options)
    return made


@pytest.fixture(scope="module")
def parts():
    return model_of()


def chat(*content):
    named = [{"type": "text", "text": c} if isinstance(c, str) else {"type": "image", "image": c} for c in content]
    return [{"role": "user", "content": named}]


def prepare(processor, chats):
    return processor.apply_chat_template(chats, tokenize=True, add_generation_prompt=True)


def test_the_grid_is_the_one_that_llava_next_takes():
    """transformers' rule on the same resolutions, over thousands of sizes and several numbers of tiles."""
    rng = np.random.default_rng(0)
    for most, least in ((2, 1), (4, 1), (6, 2), (9, 1)):
        tiling = Tiling(most, SIDE, least)
        assert {r * c for r, c in tiling.grids} <= set(range(least, most + 1))
        pinpoints = [(r * SIDE, c * SIDE) for r, c in tiling.grids]
        for width, height in [*SIZES, *rng.integers(1, 700, (500, 2)).tolist()]:
            down, across = select_best_resolution((height, width), pinpoints)
            assert tiling.grid((width, height)) == (down // SIDE, across // SIDE), (most, least, width, height)


def test_a_picture_that_fits_one_tile_is_not_cut():
    tiling = Tiling(6, SIDE)
    for size in ((32, 32), (20, 31), (1, 1), (32, 9)):
        image = picture(size)
        assert tiling.grid(size) == (1, 1) and tiling.cut(image)[0] is image and len(tiling.cut(image)) == 1


def test_tiles_hold_the_whole_picture_in_order():
    image = picture((96, 64))  # exactly 2 rows of 3 tiles
    thumbnail, *tiles = Tiling(6, SIDE).cut(image)
    assert thumbnail is image and len(tiles) == 6 and {t.size for t in tiles} == {(SIDE, SIDE)}
    rows = [np.concatenate([np.asarray(t) for t in tiles[k : k + 3]], axis=1) for k in (0, 3)]
    assert np.array_equal(np.concatenate(rows), np.asarray(image))


QFORMER = {"type": "qformer", "num_queries": 3, "hidden_dim": 16}


@pytest.mark.parametrize("max_tiles", [2, 6])
@pytest.mark.parametrize("connector", [{"type": "mlp"}, QFORMER], ids=lambda c: c["type"])
def test_the_number_of_placeholders_is_exact_for_every_size(tmp_path, max_tiles, connector):
    model, processor = model_of(max_tiles, connector)
    rng = np.random.default_rng(1)
    for number, size in enumerate([*SIZES, *map(tuple, rng.integers(1, 400, (25, 2)).tolist())]):
        image = picture(size)
        batch = prepare(processor, chat("a", image, "b"))
        places = int((batch["input_ids"] == processor.image_token_id).sum())
        with torch.no_grad():
            model(**batch)  # raises where the numbers differ
            _, mask = model.get_image_features(batch["pixel_values"], image_grids=batch["image_grids"])
        rows, columns = batch["image_grids"][0].tolist()
        each = processor.image_seq_length
        wanted = each if rows * columns == 1 else (1 + rows * columns) * each + rows
        assert places == int(mask.sum()) == wanted == processor.picture_tokens(image)
        if number < 6:  # counted from the header of the file too
            image.save(tmp_path / "a.png")
            processor._sizes.clear()
            assert processor.picture_tokens(str(tmp_path / "a.png")) == wanted


def test_rows_are_closed_by_the_separator():
    rows = TileRows(4)
    tokens = torch.arange(8.0)[:, None, None].expand(8, 2, 4)  # view v holds v
    mask = torch.ones(8, 2, dtype=torch.bool)
    mask[3, 1] = False
    out, kept = rows(tokens, mask, torch.tensor([[2, 3], [1, 1]]))
    line = rows.separator.detach()
    out = out.detach()
    seen = [-1.0 if torch.equal(x, line) else float(x[0]) for x in out[0][kept[0]]]
    assert seen == [0, 0, 1, 1, 2, 2, 3, -1, 4, 4, 5, 5, 6, 6, -1]
    assert out[1][kept[1]].tolist() == [[7.0] * 4] * 2
    with pytest.raises(UserError, match="8 views of pictures for 7 places"):
        rows(tokens, mask, torch.tensor([[2, 3]]))


def test_the_separator_gets_a_gradient_without_any_cut_picture_too():
    rows = TileRows(4)
    out, _ = rows(torch.ones(1, 2, 4), torch.ones(1, 2, dtype=torch.bool), torch.tensor([[1, 1]]))
    out.sum().backward()
    assert torch.equal(rows.separator.grad, torch.zeros(4))


def test_a_small_picture_is_seen_as_without_tiling(parts):
    torch.manual_seed(0)
    plain, processor = build_model(
        tiny_llm(), tiny_towers()[0], connectors={"vision": {"type": "mlp", "hidden_dim": 16}}, dtype=torch.float32
    )
    small = chat(picture((30, 20)), "yes?")
    with torch.no_grad():
        one, other = plain(**prepare(processor, small)).logits, parts[0](**prepare(parts[1], small)).logits
    assert torch.equal(one, other)


RECORDS = [
    {"messages": [*chat("cat?", picture(size, k)), {"role": "assistant", "content": "yes, a dog"}]}
    for k, size in enumerate([(96, 64), (20, 20), (200, 40)])
]


def test_features_and_logits_alone_in_a_batch_and_packed_are_the_same(parts):
    model, processor = parts

    def inputs(made, rows):
        return {**made(rows), **processor.media_inputs([m for r in rows for _, m in r.media], [])[0]}

    rows = [encode_conversation(r, processor) for r in RECORDS]
    padded = inputs(lambda r: collate(r, processor.pad_id), rows)
    packed = inputs(collate_packed, rows)
    assert torch.equal(padded["pixel_values"], packed["pixel_values"])
    with torch.no_grad():
        every = model.get_image_features(padded["pixel_values"], image_grids=padded["image_grids"])
        many, one_row = (model(**{k: v for k, v in b.items() if k != "labels"}).logits for b in (padded, packed))
        start = 0
        for k, row in enumerate(rows):
            alone = inputs(lambda r: collate(r, processor.pad_id), [row])
            tokens, mask = model.get_image_features(alone["pixel_values"], image_grids=alone["image_grids"])
            torch.testing.assert_close(every[0][k][every[1][k]], tokens[mask], rtol=1e-5, atol=1e-6)
            alone.pop("labels")
            single, length = model(**alone).logits[0], len(row.input_ids)
            torch.testing.assert_close(many[k, :length], single, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(one_row[0, start : start + length], single, rtol=1e-4, atol=1e-5)
            start += length


def test_a_model_folder_cuts_alike_after_a_round_trip(parts, tmp_path):
    model, processor = parts
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tiling"] == Tiling(6, SIDE).to_dict()
    again, again_processor = load_model(tmp_path, torch.float32)
    assert torch.equal(again.tile_rows.separator, model.tile_rows.separator)
    one, other = (prepare(p, chat(picture((96, 64)), "yes?")) for p in (processor, again_processor))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    told = [m.generate(**one, max_new_tokens=6)[0].tolist() for m in (model, again)]
    assert told[0] == told[1]
    low, _ = load_model(tmp_path, torch.bfloat16)
    assert low.tile_rows.separator.dtype == torch.float32


def test_our_decoder_answers_as_generate_does(parts):
    model, processor = parts
    asked = [chat(picture((96, 64)), "yes?"), chat("a", picture((200, 40), 1), picture((9, 9), 2), "dog?")]
    decoder = Decoder(model, processor)
    for answer, messages in zip(decoder.generate([Request(m, max_new_tokens=6) for m in asked]), asked):
        batch = prepare(processor, messages)
        wanted = model.generate(**batch, max_new_tokens=6)[0, batch["input_ids"].shape[1] :].tolist()
        assert answer.text == processor.decode_text(wanted)


def test_views_that_are_read_one_by_one_are_the_cuts(tmp_path):
    picture((96, 64)).save(tmp_path / "a.png")
    tiling = Tiling(6, SIDE)
    views = views_of(str(tmp_path / "a.png"), tiling, (2, 3))
    for view, wanted in zip(views, tiling.cut(load_image(tmp_path / "a.png")), strict=True):
        assert isinstance(view, View) and np.array_equal(np.asarray(load_image(view)), np.asarray(wanted))
    assert len({v.stamp() for v in views}) == 7
    assert views_of("a.png", tiling, (1, 1)) == ["a.png"]


def test_what_cannot_go_with_tiles_is_refused_in_one_line(parts):
    model, processor = parts
    with pytest.raises(UserError, match="vLLM cannot be given the tiles"):
        check_servable(model.config.to_dict(), "folder")
    with pytest.raises(UserError, match="LLaVA holds whole pictures"):
        check_parts(model)
    with pytest.raises(UserError, match="already"):
        add_tiling(model, processor, 4)
    with pytest.raises(UserError, match="needs image_grids"):
        model.get_image_features(torch.zeros(1, 3, SIDE, SIDE))
    with pytest.raises(UserError, match="leave nothing to cut"):
        model_of(2, min_tiles=3)
    with pytest.raises(UserError, match="sees the question"):
        model_of(connector={**QFORMER, "text_dim": 64})
    _, audio = tiny_towers()
    with pytest.raises(UserError, match="no vision tower"):
        add_tiling(*build_model(tiny_llm(), None, audio, dtype=torch.float32), 4)


def test_an_injector_takes_all_tiles_of_a_picture_at_one_placeholder():
    model, processor = model_of()
    add_injector(model, processor, {"type": "gated_cross_attention", "every": 1})
    batch = prepare(processor, chat(picture((96, 64)), "yes?"))
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == 1 and len(batch["pixel_values"]) == 7
    with torch.no_grad():
        assert torch.isfinite(model(**batch).logits).all()


def test_the_adapter_for_generate_says_that_it_knows_no_tiles(parts):
    from mmllm.decode.hf import generate_views

    model, processor = parts
    given = prepare(processor, [chat(picture((64, 40)), "what is there")])
    how = {"max_new_tokens": 2, "do_sample": False, "custom_generate": generate_views, "decode": "greedy"}
    with pytest.raises(UserError, match="cut into tiles; use mmllm.decode.Decoder"):
        model.eval().generate(**given, **how)
