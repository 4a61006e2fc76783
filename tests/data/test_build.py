"""The whole builder on a handful of drawings: same files for any number of workers, sound records, no leaks."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

from mmllm.data import build as b
from mmllm.data.check import check_file
from mmllm.data.concepts import read_manifest
from mmllm.data.models import resolve_dataset
from mmllm.data.records import read_records
from mmllm.data.sources import FetchReport, load_recipe
from mmllm.data.workers import Workers
from mmllm.errors import UserError

NAMES = ["cat", "dog", "pig", "owl", "rose", "key", "bell", "drum", "kite", "lamp", "sock", "pear", "lion", "duck"]


def write_art(root: Path) -> FetchReport:
    """Two vendors' SVG folders and their names, as the pip sources give them."""
    names = [
        {"name": n, "unified": f"1F60{i:X}", "short_names": [n], "short_name": n, "category": "Objects"}
        for i, n in enumerate(NAMES)
    ]
    (root / "names").mkdir(parents=True)
    (root / "names" / "emoji.json").write_text(json.dumps([x | {"subcategory": "animal-mammal"} for x in names]))
    shape = {"twemoji": '<circle cx="{c}" cy="32" r="{r}"', "openmoji": '<rect x="{r}" y="4" width="{c}" height="50"'}
    for vendor, body in shape.items():
        (root / vendor / "svg").mkdir(parents=True)
        for i in range(len(NAMES)):
            drawn = body.format(c=20 + i, r=6 + i) + f' fill="rgb({17 * i},{255 - 15 * i},90)"/>'
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64">{drawn}</svg>'
            (root / vendor / "svg" / f"1f60{i:x}.svg").write_text(svg)
    paths = {"twemoji": root / "twemoji", "openmoji": root / "openmoji", "emoji-data": root / "names"}
    return FetchReport(paths=paths)


def fill(root: Path, folder: Path, workers: int) -> dict:
    data = load_recipe("starter.yaml") | {"vocabulary": NAMES}
    data["voices"] = {"train": ["en-us", "en+f3"], "held_out": ["en-us+f4"], "every": ["pico:en-US"]}  # no Pico here
    small = {"concepts": 8, "train_scenes": 120, "val_scenes": 12, "eval_scenes": 12, "interleaved_train": 6}
    data["sizes"] = {"tiny": small | {"interleaved_eval": 4, "spoken_names": 10, "held_out_names": 6, "hear_names": 8}}
    recipe = b.parse_recipe(data)
    folder.mkdir()
    return b._fill(recipe, recipe.size("tiny"), write_art(root), None, folder, Workers(workers))


def tree(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    root = tmp_path_factory.mktemp("built")
    return root / "set", fill(root / "art", root / "set", 2)


def test_any_number_of_workers_gives_the_same_files(built: tuple[Path, dict], tmp_path: Path) -> None:
    fill(tmp_path / "art", tmp_path / "set", 1)
    assert tree(tmp_path / "set") == tree(built[0])


def test_every_record_is_sound(built: tuple[Path, dict]) -> None:
    folder, made = built
    assert made["vendors"] == {"train": ["twemoji", "stamps"], "held_out": ["openmoji"]}  # no npm: loud fallback
    counts = made["counts"]
    assert counts["align/regions_train.jsonl"] == counts["pretrain/train.jsonl"] - 16 == 120
    assert [counts[f"tune/{k}.jsonl"] for k in ("scenes", "interleaved", "sounds")] == [120, 6, 16]
    for name, n in counts.items():
        records, problems = check_file(folder / name) if n else (0, [])
        assert problems == []
        assert records == n


def test_splits_and_vendors_do_not_leak(built: tuple[Path, dict]) -> None:
    folder = built[0]
    splits = read_json(folder / "splits.json")["splits"]
    pictures = {p.stem: read_records(p) for p in (folder / "align").glob("image_*.jsonl")}
    groups = {name: {r["group"] for r in records} for name, records in pictures.items()}
    assert not groups["image_train"] & (groups["image_val"] | groups["image_new_concept"])
    assert groups["image_known_new_vendor"] <= groups["image_train"]
    assert {r["meta"]["vendor"] for r in pictures["image_train"]} == {"twemoji"}
    assert {r["meta"]["vendor"] for r in pictures["image_known_new_vendor"]} == {"openmoji"}
    for c in read_json(folder / "concepts.json")["vocabulary"]:
        assert all(splits[i] == "train" for i in c["seen"] + c["new"])
    for name in ("regions_train", "regions_val"):
        tiles = {t for r in read_records(folder / f"align/{name}.jsonl") for t in r["meta"]["tiles"]}
        assert all(t.startswith("twemoji/") for t in tiles)
    new = {t for r in read_records(folder / "eval/scenes_new_vendor.jsonl") for t in r["meta"]["tiles"]}
    assert new and all(t.startswith("openmoji/") for t in new)


def test_interleaved_answers_are_true(built: tuple[Path, dict]) -> None:
    records = read_records(built[0] / "eval/interleaved_seen.jsonl")
    assert len(records) == 4
    for r in records:
        assert sorted(x["answer"] for x in r["meta"]["questions"]) == ["no", "no", "yes", "yes"]
        for asked, branch in zip(r["meta"]["questions"], r["branches"]):
            here = {x["text"] for x in r["meta"]["boxes"][asked["picture"] - 1]}
            assert (
                branch[0]["content"][0]["text"] == f"Is there {article(asked['label'])} in picture {asked['picture']}?"
            )
            assert branch[1]["content"][0]["text"] == ("yes" if asked["label"] in here else "no")


def test_lessons_about_several_pictures_ask_the_same_of_two_of_them(built: tuple[Path, dict]) -> None:
    records = read_records(built[0] / "tune/interleaved.jsonl")
    assert len(records) == 6
    for r in records:
        answers: dict[str, set[str]] = {}
        captions = 0
        for asked, branch in zip(r["meta"]["questions"], r["branches"], strict=True):
            things, k = r["meta"]["boxes"], asked["picture"]
            question, answer = (m["content"][0]["text"] for m in branch)
            if asked["label"]:
                here = asked["label"] in {x["text"] for x in things[k - 1]}
                assert question.endswith(f"in picture {k}?") and answer == ("yes" if here else "no")
                answers.setdefault(asked["label"], set()).add(answer)
            else:
                captions += 1
                assert question == f"What is in picture {k}?"
                assert all(x["text"] in answer for x in things[k - 1])
        assert captions == 3
        # A thing that stands in all three pictures has no pair.
        everywhere = set.intersection(*({x["text"] for x in scene} for scene in r["meta"]["boxes"]))
        assert answers and all(given == {"yes", "no"} for label, given in answers.items() if label not in everywhere)


def test_scenes_are_asked_true_questions_and_more_about_what_is_there(built: tuple[Path, dict]) -> None:
    scenes = {Path(r["image"]).resolve(): r for r in read_records(built[0] / "align/regions_train.jsonl")}
    records = read_records(built[0] / "tune/scenes.jsonl")
    answers: Counter[str] = Counter()
    counted = 0
    for r in records:
        things = {b["text"] for b in scenes[Path(r["messages"][0]["content"][0]["path"]).resolve()]["boxes"]}
        asked = [tuple(m["content"][0]["text"] for m in branch) for branch in r["branches"]]
        said = [(q, a) for q, a in asked if q.startswith(("Is there", "Are there"))]
        assert all((a == "yes") == any(q.endswith(f"there {article(x)}?") for x in things) for q, a in said)
        assert {"yes", "no"} == {a for _, a in said}
        answers.update(a for _, a in said)
        counted += any(q == "How many things are there?" for q, _ in asked)
    assert 1.2 < answers["yes"] / answers["no"] < 1.6 and 0.2 < counted / len(records) < 0.5


def test_hearing_has_one_right_option_of_four(built: tuple[Path, dict]) -> None:
    for r in read_records(built[0] / "eval/hear.jsonl"):
        assert len(set(r["options"])) == 4 and r["label"] in r["options"]
        assert r["answer"] == article(r["label"])
        assert r["meta"]["voice"] == "en-us+f4"


def test_unknown_size_and_folder_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'fast'"):
        b.build_dataset("starter.yaml", "fats", offline=True)
    (tmp_path / "mine").write_text("x")
    data = load_recipe("starter.yaml")
    recipe = b.parse_recipe(data)
    with pytest.raises(UserError, match="held-out|art"):
        b.choose_vendors(recipe, {"stamps": tmp_path})
    with pytest.raises(UserError, match="unknown key 'voicse'"):
        b.parse_recipe(data | {"voicse": {}})
    assert recipe.splits and read_manifest(b.RECIPES / recipe.splits)


@pytest.mark.slow
def test_fast_starter_set_is_whole() -> None:
    """The real thing: built from the cached sources if it is not there yet."""
    folder = b.build_dataset("starter.yaml", "fast")
    assert resolve_dataset("starter:fast") == folder
    about = read_json(folder / "dataset.json")
    assert about["counts"]["align/regions_train.jsonl"] == 400
    learned = ("align/image_train", "align/speech_real", "tune/scenes", "tune/interleaved", "tune/sounds")
    for name in (*learned, "eval/interleaved_seen", "eval/hear"):
        assert check_file(folder / f"{name}.jsonl")[1] == []
    before = (folder / "dataset.json").stat().st_mtime_ns
    assert b.build_dataset("starter.yaml", "fast", offline=True) == folder
    assert (folder / "dataset.json").stat().st_mtime_ns == before  # up to date: not built again


def test_sounds_that_are_asked_about_are_those_that_are_aligned(built: tuple[Path, dict]) -> None:
    folder = built[0]
    read = lambda name: [json.loads(x) for x in (folder / name).read_text().splitlines()]  # noqa: E731
    aligned = read("align/hear_train.jsonl")
    asked = [r["messages"][0]["content"][0]["path"] for r in read("tune/sounds.jsonl")]
    assert asked and {r["audio"] for r in aligned} == set(asked)
    assert {r["label"] for r in aligned} >= {r["label"] for r in read("eval/hear.jsonl")}
    assert not {r["meta"]["voice"] for r in aligned} & {r["meta"]["voice"] for r in read("eval/hear.jsonl")}


def test_preview_is_one_page_without_links(built: tuple[Path, dict], tmp_path: Path) -> None:
    from mmllm.cli.data import command

    page = tmp_path / "p.html"
    records = built[0] / "pretrain/train.jsonl"
    done = CliRunner().invoke(command, ["preview", str(records), "--out", str(page), "-n", "30"])
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert text.count('class="card"') == 30
    assert "data:image/jpeg" in text and "data:audio/wav" in text and "http" not in text


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def article(label: str) -> str:
    return ("an " if label[0] in "aeiou" else "a ") + label
