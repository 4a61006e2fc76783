"""Caption benchmarks and ESC-50 on a real tiny align run: figures against ranks counted one by one."""

import pytest
import torch
from click.testing import CliRunner

from mmllm.align import AlignModel, save_align
from mmllm.align.config import HeadConfig
from mmllm.align.model import ProjectionHead
from mmllm.data.media import load_audio, load_image
from mmllm.errors import UserError
from mmllm.evaluate.benchmarks.aligned import run_aligned
from mmllm.report.figures import read_figures
from mmllm.towers import load_tower

TEXTS = ["a dog runs", "two cats", "a red house by the sea", "rain on a roof", "a bell", "wind"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An untrained model of pictures, sounds and texts."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "layers": 1, "heads": 2}
    towers = {
        "image": load_tower({"model": "tiny:vit", "image_size": 16, **small}, "vision"),
        "audio": load_tower({"model": "tiny:audio", "hidden_size": 16, "depth": 1}, "audio"),
        "text": load_tower({"model": "tiny:text", **small}, "text"),
    }
    heads = {n: ProjectionHead(t.pooled_size, 16, HeadConfig()) for n, t in towers.items()}
    model = AlignModel(towers, {n: n for n in towers}, heads, {}, [("image", "text"), ("audio", "text")], 16).eval()
    folder = tmp_path_factory.mktemp("align")
    save_align(model, folder, {})
    return folder, model


def recall(sim, own, k):
    """Share of rows with one of their own among the first k."""
    first = [set(row.argsort(descending=True)[:k].tolist()) for row in sim]
    return sum(bool(f & set(o)) for f, o in zip(first, own)) / len(own)


def test_retrieval_of_pictures_and_captions(run, tmp_path, make):
    folder, model = run
    images = [{"filename": f"{i}.png", "split": "test", "sentences": [{"raw": f"{t} {k}"} for k in range(2)]}
              for i, t in enumerate(TEXTS)]  # fmt: skip
    make.dump(tmp_path / "flickr30k/dataset_flickr30k.json", {"images": images})
    paths = [make.draw(tmp_path / f"flickr30k/flickr30k-images/{i}.png") for i in range(6)]
    got = {f.name: f for f in run_aligned(folder, tmp_path, ["flickr30k"], out=tmp_path / "out")}
    captions = [s["raw"] for row in images for s in row["sentences"]]
    sim = model.embed("image", [load_image(p) for p in paths]) @ model.embed("text", captions).T
    for k in (1, 5):
        own = [(2 * i, 2 * i + 1) for i in range(6)]
        assert got[f"flickr30k_image_to_text_r{k}"].value == pytest.approx(recall(sim, own, k))
        back = recall(sim.T, [(i // 2,) for i in range(12)], k)
        assert got[f"flickr30k_text_to_image_r{k}"].value == pytest.approx(back)
    assert got["flickr30k_text_to_image_r1"].chance == pytest.approx(1 / 6)
    assert {f.name for f in read_figures(tmp_path / "out" / "results.json")} == set(got)


def test_zero_shot_classes_of_sounds(run, tmp_path, make):
    folder, model = run
    names = ["dog", "rain", "sea_waves", "cat", "bell", "wind", "clock"]
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    lines += [f"{i}.wav,1,{i},{n},False,{i},A" for i, n in enumerate([*names, "dog"])]
    paths = [make.play(tmp_path / "ESC-50/audio" / f"{i}.wav", 0.1 + 0.05 * i) for i in range(8)]
    (tmp_path / "ESC-50/meta").mkdir()
    (tmp_path / "ESC-50/meta/esc50.csv").write_text("\n".join(lines) + "\n")
    from mmllm.cli.eval import command

    args = ["--align", str(folder), "--data", str(tmp_path), "--tasks", "esc50", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(command, args, catch_exceptions=False)
    got = {f.name: f for f in read_figures(tmp_path / "out" / "results.json")}
    assert result.exit_code == 0 and "esc50_zero_shot_accuracy" in result.output
    classes = sorted(n.replace("_", " ") for n in names)
    sounds = model.embed("audio", [load_audio(p, 16000) for p in paths])
    best = (sounds @ model.embed("text", [f"This is a sound of {c}." for c in classes]).T).argmax(1).tolist()
    truth = [classes.index(n.replace("_", " ")) for n in [*names, "dog"]]
    hits = [b == t for b, t in zip(best, truth)]
    assert got["esc50_zero_shot_accuracy"].value == pytest.approx(sum(hits) / 8)
    dogs = (hits[0] + hits[7]) / 2
    assert got["esc50_zero_shot_mean_recall"].value == pytest.approx((dogs + sum(hits[1:7])) / 7)
    assert got["esc50_zero_shot_top5"].chance == 5 / 7


def test_zero_shot_classes_of_folders_of_pictures(run, tmp_path, make):
    folder, model = run
    root = tmp_path / "imagefolder"
    paths = [make.draw(root / f"test/{c}/{i}.png") for c in ("n01", "n02", "n03") for i in range(2)]
    (root / "classnames.txt").write_text("tench\nred fox\nsea lion\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na drawing of the {c}.\n")
    got = {f.name: f for f in run_aligned(folder, tmp_path, ["imagefolder"], out=tmp_path / "out")}
    names = ["tench", "red fox", "sea lion"]
    words = [[t.replace("{c}", n) for t in ("a photo of a {c}.", "a drawing of the {c}.")] for n in names]
    classes = torch.stack([torch.nn.functional.normalize(model.embed("text", w).mean(0), dim=0) for w in words])
    best = (model.embed("image", [load_image(p) for p in paths]) @ classes.T).argmax(1).tolist()
    hits = [b == t for b, t in zip(best, [0, 0, 1, 1, 2, 2])]
    assert got["imagefolder_zero_shot_accuracy"].value == pytest.approx(sum(hits) / 6)
    recalls = [(hits[2 * k] + hits[2 * k + 1]) / 2 for k in range(3)]
    assert got["imagefolder_zero_shot_mean_recall"].value == pytest.approx(sum(recalls) / 3)
    (root / "classnames.txt").write_text("tench\nred fox\n")
    with pytest.raises(UserError, match="2 names for 3 folders"):
        run_aligned(folder, tmp_path, ["imagefolder"], out=tmp_path / "out")
    with pytest.raises(UserError, match="no folders of classes here"):
        (tmp_path / "empty").mkdir()
        run_aligned(folder, tmp_path / "empty", ["imagefolder"], out=tmp_path / "out")


def test_a_run_without_sounds_says_so(run, tmp_path, make):
    model = run[1]
    bare = AlignModel({n: model.towers[n] for n in ("image", "text")}, {"image": "image", "text": "text"},
                      {n: model.heads[n] for n in ("image", "text")}, {}, [("image", "text")], 16)  # fmt: skip
    save_align(bare, tmp_path / "run", {})
    (tmp_path / "clotho").mkdir()
    (tmp_path / "clotho/clotho_captions_evaluation.csv").write_text("file_name,caption_1\na.wav,x\nb.wav,y\n")
    for name in "ab":
        make.play(tmp_path / "clotho/evaluation" / f"{name}.wav")
    with pytest.raises(UserError, match="this run aligned no audio; it has: image, text|aligned no audio"):
        run_aligned(tmp_path / "run", tmp_path, ["clotho"])
