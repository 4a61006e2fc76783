"""Turns tiles, scenes and clips into the starter dataset's record files: align, pretrain, tune and eval."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.data import questions as q
from mmllm.data.concepts import noun
from mmllm.data.tiles import Tile

Scenes = list[tuple[str, list[dict[str, Any]], list[str]]]  # (path in the dataset, boxes, tile ids)
Clips = list[tuple[str, str, str]]  # (name, voice, path in the dataset)


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Writes one JSON object a line; returns how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    n = 0
    with open(path, "w", encoding="utf-8") as f:
        for record in records:
            f.write(json.dumps(record, ensure_ascii=False) + "\n")
            n += 1
    return n


def tile_record(tile: Tile, group: str, split: str) -> dict[str, Any]:
    """A picture with its three captions; the last one names its kind, which is what zero-shot asks for."""
    texts = [tile.label, f"a picture of {q.with_article(tile.label)}", f"{tile.label}, a kind of {tile.subgroup}"]
    meta = {
        "vendor": tile.vendor,
        "split": split,
        "category": tile.category,
        "subgroup": tile.subgroup,
        "key": tile.key,
    }
    return {"id": tile.id, "image": f"../{tile.path}", "text": texts, "label": tile.label, "group": group, "meta": meta}


def align_pictures(
    tiles: Sequence[Tile], groups: Mapping[str, str], splits: Mapping[str, str], held_out: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """The five picture files: seen or new concept (by split) times seen or new vendor."""
    files: dict[str, list[dict[str, Any]]] = {
        k: [] for k in ("train", "val", "known_new_vendor", "new_concept", "new_concept_new_vendor")
    }
    where = {("train", False): "train", ("val", False): "val", ("test", False): "new_concept"}
    where |= {("train", True): "known_new_vendor", ("test", True): "new_concept_new_vendor"}
    for t in tiles:
        name = where.get((splits[t.id], t.vendor in held_out))
        if name:
            files[name].append(tile_record(t, groups[t.id], splits[t.id]))
    return files


def speech_records(clips: Clips, split_of_name: Mapping[str, str], prefix: str) -> list[dict[str, Any]]:
    """Spoken names; ``meta.split`` is the split of the concept that the name belongs to."""
    return [
        {
            "id": f"{prefix}/{i:05d}",
            "audio": f"../{path}",
            "text": [name],
            "label": name,
            "group": noun(name),
            "meta": {"voice": voice, "split": split_of_name.get(name, "train")},
        }
        for i, (name, voice, path) in enumerate(clips)
    ]


def region_records(scenes: Scenes, prefix: str, vendor: str) -> list[dict[str, Any]]:
    """Scenes with their boxes."""
    return [
        {"id": f"{prefix}/{i:06d}", "image": f"../{path}", "boxes": boxes, "meta": {"vendor": vendor, "tiles": tiles}}
        for i, (path, boxes, tiles) in enumerate(scenes)
    ]


def _labels(boxes: Sequence[Mapping[str, Any]]) -> list[str]:
    return [b["text"] for b in boxes]


def caption_conversations(scenes: Scenes) -> list[dict[str, Any]]:
    """One picture, one caption."""
    return [
        {
            "id": f"caption/{i:06d}",
            "messages": q.picture_prefix([f"../{path}"]),
            "branches": [q.branch(q.caption(boxes))],
        }
        for i, (path, boxes, _) in enumerate(scenes)
    ]


def naming_conversations(clips: Clips) -> list[dict[str, Any]]:
    """One sound, "What do you hear?"."""
    return [
        {"id": f"name/{i:05d}", "messages": q.sound_prefix(f"../{path}"), "branches": [q.branch(q.hear(name))]}
        for i, (name, _, path) in enumerate(clips)
    ]


def scene_conversations(
    scenes: Scenes, vocabulary: Sequence[str], blocks: Mapping[str, Sequence[str]], seed: int, balanced: bool = False
) -> list[dict[str, Any]]:
    """One picture, several questions as branches.

    Of two questions about what is not there, one is left out in two scenes of three: a small model sees less on new
    pictures than on those it learned from, and so leans to "no". Things are counted in one scene of three.
    ``balanced`` leaves out nothing.
    """
    out = []
    for i, (path, boxes, _) in enumerate(scenes):
        which = np.random.default_rng((seed, 16, i))
        kinds = [k for k in q.SCENE_KINDS if balanced or k != "count" or which.random() < 1 / 3]
        asked = q.scene_questions(boxes, vocabulary, np.random.default_rng((seed, 11, i)), blocks, kinds)
        denied = [x for x in asked if x.kind == "exists" and x.answer == "no"]
        if not balanced and len(denied) > 1 and which.random() < 2 / 3:
            asked.remove(denied[0])
        record = {"id": f"scene/{i:06d}", "messages": q.picture_prefix([f"../{path}"])}
        out.append(record | {"branches": [q.branch(x) for x in asked]})
    return out


def interleaved_record(name: str, three: Scenes, asked: Sequence[tuple[q.QA, int, str]]) -> dict[str, Any]:
    """Several pictures, and questions about one of them each: (question, number of its picture, label or "")."""
    return {
        "id": name,
        "messages": q.picture_prefix([f"../{path}" for path, _, _ in three]),
        "branches": [q.branch(x) for x, _, _ in asked],
        "meta": {
            "questions": [{"picture": k, "label": label, "answer": x.answer} for x, k, label in asked],
            "boxes": [boxes for _, boxes, _ in three],
        },
    }


def interleaved_test(three: Scenes, rng: np.random.Generator, vocabulary: Sequence[str]) -> list[tuple[q.QA, int, str]]:
    """Four questions: two yes, two no; one "no" names a thing that stands in another picture."""
    asked: list[tuple[q.QA, int, str]] = []
    for _ in range(40):  # more than four tries only where a question would come twice
        turn = len(asked)
        if turn == 4:
            break
        k = int(rng.integers(len(three)))
        here = _labels(three[k][1])
        elsewhere = [x for j, s in enumerate(three) if j != k for x in _labels(s[1]) if x not in here]
        only_here = [x for x in here if all(x not in _labels(s[1]) for j, s in enumerate(three) if j != k)] or here
        if turn < 2:
            label = only_here[int(rng.integers(len(only_here)))]
        elif turn == 2 and elsewhere:
            label = elsewhere[int(rng.integers(len(elsewhere)))]
        else:
            label = q.absent_label(here, vocabulary, rng)
        asks = (q.interleaved(label, k + 1, turn < 2), k + 1, label)
        if asks not in asked:
            asked.append(asks)
    return [asked[i] for i in rng.permutation(len(asked))]


def interleaved_lesson(
    three: Scenes, rng: np.random.Generator, vocabulary: Sequence[str]
) -> list[tuple[q.QA, int, str]]:
    """What is in each picture, and pairs of questions that differ in the picture's number alone: one yes, one no.

    Who looks for a thing in any of the pictures answers half of a pair wrong, so that the number must be learned.
    Questions about what is in none of them are left out: with them a small model leans to "no".
    """
    asked = [(q.caption(boxes, k), k, "") for k, (_, boxes, _) in enumerate(three, 1)]
    for _ in range(4):
        k = int(rng.integers(len(three)))
        here = _labels(three[k][1])
        label = here[int(rng.integers(len(here)))]
        without = [j for j, (_, boxes, _) in enumerate(three) if label not in _labels(boxes)]
        if without:
            j = without[int(rng.integers(len(without)))]
            asked += [(q.interleaved(label, at + 1, at == k), at + 1, label) for at in (k, j)]
    unique = list(dict.fromkeys(asked))
    return [unique[i] for i in rng.permutation(len(unique))]


def interleaved_conversations(
    scenes: Scenes, n: int, vocabulary: Sequence[str], seed: int, prefix: str, test: bool
) -> list[dict[str, Any]]:
    """``n`` documents of three pictures; in a ``test`` no picture stands twice, as far as the scenes suffice."""
    rng = np.random.default_rng((seed, 12))
    order = rng.permutation(len(scenes))
    ask = interleaved_test if test else interleaved_lesson
    out = []
    for i in range(n):
        at = [3 * i, 3 * i + 1, 3 * i + 2] if test else rng.choice(len(scenes), 3, replace=False)
        if test and at[-1] >= len(scenes):
            break
        three = [scenes[int(order[j])] if test else scenes[int(j)] for j in at]
        out.append(interleaved_record(f"{prefix}/{i:05d}", three, ask(three, rng, vocabulary)))
    return out


def hearing_options(name: str, names: Sequence[str], rng: np.random.Generator) -> list[str]:
    """The name among three others that share no word with it or with each other, in random order."""
    chosen, words = [name], set(name.split())
    while len(chosen) < 4:
        other = names[int(rng.integers(len(names)))]
        if not words & set(other.split()):
            chosen.append(other)
            words |= set(other.split())
    return [chosen[i] for i in rng.permutation(4)]


def hearing_conversations(clips: Clips, names: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """One sound: the open question and three choices of four."""
    out = []
    for i, (name, _, path) in enumerate(clips):
        rng = np.random.default_rng((seed, 13, i))
        asked = [q.hear(name), *(q.hear(name, hearing_options(name, names, rng)) for _ in range(3))]
        record = {"id": f"hear/{i:05d}", "messages": q.sound_prefix(f"../{path}")}
        out.append(record | {"branches": [q.branch(x) for x in asked]})
    return out


def hearing_eval(clips: Clips, names: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """One sound, four options, one answer; also as an ordinary conversation."""
    out = []
    for i, (name, voice, path) in enumerate(clips):
        options = hearing_options(name, names, np.random.default_rng((seed, 14, i)))
        x = q.hear(name, options)
        record: dict[str, Any] = {
            "id": f"hear_eval/{i:05d}",
            "audio": f"../{path}",
            "question": x.question,
            "label": name,
        }
        record |= {"options": options, "answer": x.answer, "meta": {"voice": voice}}
        out.append(record | {"messages": q.sound_prefix(f"../{path}"), "branches": [q.branch(x)]})
    return out


def shuffled(records: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """The records in a random order that depends on the seed alone."""
    return [records[i] for i in np.random.default_rng((seed, 15)).permutation(len(records))]
