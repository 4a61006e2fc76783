"""Records of every format, read back through real files; the tar reader agrees with the webdataset library."""

from __future__ import annotations

import csv
import io
import json
import tarfile

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmllm.data.blob import Blob, ShardBlob, media_stamp
from mmllm.data.media import load_audio, load_image, open_image
from mmllm.data.open import DataSpec, braces, expand, located_records, open_records
from mmllm.data.rejected import Rejected
from mmllm.errors import UserError


def picture(number: int, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6 + number, 5), (number, 0, 0)).save(buffer, format)
    return buffer.getvalue()


def sound(number: int) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.full(400 + number, 0.1), 16000, format="FLAC")
    return buffer.getvalue()


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shard_files(start, count):
    for i in range(start, start + count):
        yield f"{i:06d}.png", picture(i)
        yield f"{i:06d}.txt", f"caption {i}\n".encode()
        yield f"{i:06d}.json", json.dumps({"caption": f"other {i}", "width": i}).encode()


# ---- tables ----


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t"), (".csv", "\t"), (".csv", ";")])
def test_table_with_a_column_map_and_several_texts(tmp_path, suffix, separator):
    file = tmp_path / f"pairs{suffix}"
    with file.open("w", newline="", encoding="utf-8-sig") as f:
        out = csv.writer(f, delimiter=separator)
        out.writerow(["filepath", "title", "fr", "label", "year"])
        out.writerow(["a.png", 'a "red", bird\nin snow', "", "bird", "7"])
        out.writerow(["b.png", "a cat", "un chat", "", ""])
    columns = {"image": "filepath", "text": {"en": "title", "fr": "fr"}}
    first, second = open_records(file, columns)
    assert first == {
        "image": str(tmp_path / "a.png"), "text": {"en": 'a "red", bird\nin snow'}, "label": "bird",
        "meta": {"year": "7"}, "id": "pairs-2",
    }  # fmt: skip
    # The first row fills lines 2 and 3.
    assert second["text"] == {"en": "a cat", "fr": "un chat"} and second["id"] == "pairs-4"
    several = next(open_records({"path": str(file), "columns": {"text": ["title", "fr"]}}))
    assert several["text"] == ['a "red", bird\nin snow'] and several["meta"]["filepath"] == "a.png"


def test_table_mistakes(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("image,text\na.png,x\nb.png\nc.png,y\n")
    found = list(located_records(file))
    assert [f.place for f in found] == [2, 3, 4] and "1 cells under 2 columns" in str(found[1].problem)
    with pytest.raises(UserError, match=r"t.csv:3: 1 cells"):
        list(open_records(file))
    rejected = Rejected()
    assert len(list(open_records(file, rejected=rejected))) == 2 and rejected.count() == 1
    with pytest.raises(UserError, match="did you mean 'image'"):
        list(open_records(file, {"image": "imag"}))
    with pytest.raises(UserError, match="unknown record field 'txt'"):
        list(open_records(file, {"txt": "text"}))
    for content, words in (("a,a\n1,2\n", "two columns"), ("", "no header"), ("\n", "no header")):
        file.write_text(content)
        with pytest.raises(UserError, match=words):
            list(open_records(file))


# ---- webdataset shards ----


def test_shards_by_braces_in_order_with_media_left_in_the_tar(tmp_path):
    for k in range(3):
        write_tar(tmp_path / f"s-{k:02d}.tar", shard_files(10 * k, 3))
    records = list(open_records(str(tmp_path / "s-{00..02}.tar")))
    assert [r["id"] for r in records] == [f"s-{k:02d}/{10 * k + i:06d}" for k in range(3) for i in range(3)]
    assert records[4]["text"] == "caption 11" and records[4]["meta"] == {"caption": "other 11", "width": 11}
    assert isinstance(records[4]["image"], ShardBlob) and records[4]["image"].read() == picture(11)
    assert load_image(records[4]["image"]).size == (17, 5)
    other = next(open_records(str(tmp_path / "s-01.tar"), {"text": ["txt", "caption"]}))
    assert other["text"] == ["caption 10", "other 10"]
    folder = list(open_records(tmp_path))
    assert [r["id"] for r in folder] == [r["id"] for r in records]
    assert list(open_records({"path": f"{tmp_path}/*.tar", "limit": 4}))[-1]["id"] == "s-01/000010"
    assert len({media_stamp(r["image"]) for r in records}) == 9


def test_same_samples_as_the_webdataset_library(tmp_path):
    wds = pytest.importorskip("webdataset")
    files = [*shard_files(0, 3), ("__meta__.json", b"{}"), ("sub/x.y.png", picture(3)), ("sub/x.seg.png", picture(4))]
    files += [("./z.wav", sound(1)), ("./z.TXT", b"capitals"), ("lonely", b"no ending")]
    path = write_tar(tmp_path / "a.tar", files)
    theirs = {}
    for sample in wds.WebDataset(str(path), shardshuffle=False, empty_check=False):
        data = {k: v for k, v in sample.items() if not k.startswith("__")}
        theirs[sample["__key__"].removeprefix("./")] = data
    from mmllm.data.shards import shard_rows

    ours = {str(item.place): item.record for item in shard_rows(path)}
    assert set(ours) == set(theirs)
    for key, row in ours.items():
        for ending, data in theirs[key].items():
            if ending == "json":
                assert all(row[k] == v for k, v in json.loads(data).items())
            else:
                value = row[ending]
                assert (value.read() if isinstance(value, Blob) else value.encode()) == data.strip()


def test_sounds_captions_and_labels_from_json_and_a_compressed_shard(tmp_path):
    files = [("a.flac", sound(0)), ("a.json", json.dumps({"text": ["one", "two"], "id": 5}).encode())]
    files += [("b.wav", sound(9)), ("b.cls", b"3"), ("b.txt", b"three")]
    plain = list(open_records(write_tar(tmp_path / "p.tar", files)))
    packed = list(open_records(write_tar(tmp_path / "p.tar.gz", files, "w:gz")))
    assert plain[0]["text"] == ["one", "two"] and plain[0]["id"] == "5" and plain[1]["label"] == "3"
    assert [len(load_audio(r["audio"])) for r in plain] == [400, 409]
    assert packed[0]["audio"] == plain[0]["audio"].read() and packed[1]["id"] == "p/b"


def test_broken_shards_and_samples(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*shard_files(0, 3)])
    data = path.read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: 512 * 7 + 100])
    good, *bad = located_records(tmp_path / "cut.tar")
    assert good.record["id"] == "cut/000000" and any("broken after 000001" in str(b.problem) for b in bad)
    (tmp_path / "no.tar").write_bytes(b"only words" * 200)
    with pytest.raises(UserError, match="not a tar"):
        list(open_records(tmp_path / "no.tar"))
    odd = write_tar(tmp_path / "odd.tar", [("a.txt", b"\xff\xfe"), ("b.json", b"[1]"), ("c.txt", b"fine")])
    problems = {item.place: item.problem for item in located_records(odd)}
    assert "no text in UTF-8" in problems["a"] and "not valid" in problems["b"] and problems["c"] is None


def test_patterns():
    assert braces("a{08..11}.tar") == ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]
    assert braces("{x,y}{1..2}") == ["x1", "x2", "y1", "y2"] and braces("a{3..1}") == ["a3", "a2", "a1"]
    spec = DataSpec(path="a.tar::b.csv")
    assert [(k, str(p)) for k, p in expand(spec, "d")] == [("shards", "d/a.tar"), ("table", "d/b.csv")]
    for bad, words in (("a{3}.tar", "neither a list"), ("s3://b/a.tar", "from this machine"), ("x*.tar", "no file")):
        with pytest.raises(UserError, match=words):
            expand(DataSpec(path=bad), "d")


# ---- folders ----


def test_folder_of_media_with_texts_beside_them(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(picture(1))
    (tmp_path / "in" / "a.txt").write_text("first")
    (tmp_path / "b.flac").write_bytes(sound(0))
    (tmp_path / "notes.pdf").write_bytes(b"")
    assert list(open_records(tmp_path)) == [
        {"id": "b", "audio": str(tmp_path / "b.flac")},
        {"id": "in/a", "image": str(tmp_path / "in" / "a.png"), "text": "first"},
    ]
    with pytest.raises(UserError, match="no pictures"):
        list(open_records({"path": str(tmp_path / "in"), "format": "folder"} | {"path": str(empty(tmp_path))}))


def empty(folder):
    (folder / "empty").mkdir()
    return folder / "empty"


# ---- parquet ----


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    rows = {
        "picture": [{"bytes": picture(i), "path": None} if i != 1 else None for i in range(4)],
        "pages": [[{"bytes": picture(9), "path": None}] for _ in range(4)],
        "caption": ["zero", "one", "two", "three"],
        "score": [0.5, 1.5, 2.5, 3.5],
    }
    kinds = {"picture": datasets.Image(), "pages": datasets.List(datasets.Image())}
    kinds |= {"caption": datasets.Value("string"), "score": datasets.Value("float32")}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    data.to_parquet(tmp_path / "p.parquet")
    return tmp_path / "p.parquet"


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_keeps_bytes_until_they_are_wanted(parquet, streaming):
    columns = {"image": "picture", "text": "caption"}
    records = list(open_records({"path": str(parquet), "columns": columns, "streaming": streaming}))
    assert [r["text"] for r in records] == ["zero", "one", "two", "three"]
    assert "image" not in records[1] and records[2]["meta"]["score"] == 2.5 and records[3]["id"] == "p-4"
    image = records[2]["image"]
    assert isinstance(image, bytes if streaming else Blob)
    assert (image if streaming else image.read()) == picture(2)
    assert len({media_stamp(r["image"]) for r in records if "image" in r}) == 3
    pages = next(open_records({"path": str(parquet), "columns": {"image": "pages"}, "streaming": streaming}))
    assert pages["image"] == [picture(9)]


def test_parquet_mistakes(parquet):
    with pytest.raises(UserError, match="did you mean 'caption'"):
        list(open_records(parquet, {"text": "captio"}))
    broken = parquet.with_name("b.parquet")
    broken.write_bytes(b"words")
    with pytest.raises(UserError, match="cannot be read"):
        list(open_records(broken))


# ---- pictures ----


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path):
    down, across = np.mgrid[0:480, 0:640]
    smooth = np.stack([down / 2, across / 3, (down + across) / 5], -1).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "a.jpg", quality=95)
    whole, quarter = open_image(tmp_path / "a.jpg"), open_image(tmp_path / "a.jpg", side=120)
    assert whole.size == (640, 480) and quarter.size == (160, 120)
    assert open_image(tmp_path / "a.jpg", side=241).size == (640, 480)  # half would be too small
    small = (np.asarray(i.resize((60, 60), Image.Resampling.BOX), float) for i in (whole, quarter))
    assert np.abs(next(small) - next(small)).mean() < 2
    (tmp_path / "b.png").write_bytes(picture(3))
    assert open_image(tmp_path / "b.png", side=2).size == (9, 5)


def test_media_from_bytes_and_files_are_the_same(tmp_path):
    (tmp_path / "a.flac").write_bytes(sound(5))
    assert np.array_equal(load_audio(tmp_path / "a.flac"), load_audio(sound(5)))
    (tmp_path / "a.png").write_bytes(picture(5))
    assert load_image(picture(5)).tobytes() == load_image(tmp_path / "a.png").tobytes()
    with pytest.raises(UserError, match="10 bytes: not a picture"):
        load_image(b"only words")
    gone = ShardBlob(str(tmp_path / "none.tar"), 0, 5, "none.tar:a.png")
    with pytest.raises(UserError, match="none.tar:a.png: cannot be read"):
        load_image(gone)
