"""Chat through the real command line on a tiny model folder: one question, a session, boxes, mistakes."""

import io
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from PIL import Image
from tiny_mm import tiny_model

from mmllm.cli.main import main
from mmllm.decode import Decoder, Request
from mmllm.errors import UserError
from mmllm.starter.chat import Chat, draw_boxes, talk


@pytest.fixture(scope="module")
def parts():
    return tiny_model()


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    path = tmp_path_factory.mktemp("chat")
    model, processor = parts
    model.save_pretrained(path / "model")
    processor.save_pretrained(path / "model")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 30, 3), np.uint8)).save(path / "a.png")
    soundfile.write(path / "a.wav", rng.standard_normal(8000).astype("f") / 4, 16000)
    (path / "text.png").write_text("no picture")
    return path


def run(capsys, *argv):
    with pytest.raises(SystemExit) as end:
        main(["chat", *map(str, argv)])
    out, err = capsys.readouterr()
    return end.value.code, out, err


def test_one_question_about_a_picture_and_a_sound(folder, parts, capsys):
    media = [{"type": "image", "image": str(folder / "a.png")}, {"type": "audio", "audio": str(folder / "a.wav")}]
    messages = [{"role": "user", "content": [*media, {"type": "text", "text": "What is it?"}]}]
    expected = Decoder(*parts).generate([Request(messages, "vcd", max_new_tokens=8, seed=4)])[0].text
    code, out, _ = run(
        capsys, folder / "model", "-i", folder / "a.png", "-a", folder / "a.wav", "-q", "What is it?",
        "--decode", "vcd", "--max-new-tokens", 8, "--seed", 4, "--dtype", "float32",
    )  # fmt: skip
    assert code == 0
    assert out == expected + "\n"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["{m}", "-q", " "], "question is empty"),
        (["{m}", "-q", "x", "--decode", "vdc"], "did you mean 'vcd'"),
        (["{m}", "-i", "{d}/text.png", "-q", "x"], "not a picture"),
        (["{m}", "-i", "{d}/none.png", "-q", "x"], "no such picture"),
        (["{d}/none", "-q", "x"], "no such folder"),
        (["{d}", "-q", "x"], "no model here"),
        (["{m}", "-q", "x", "--out", "{d}/none/boxes.png"], "no such folder"),
    ],
)
def test_mistakes_end_in_one_line(folder, capsys, argv, says):
    code, out, err = run(capsys, *(a.format(m=folder / "model", d=folder) for a in argv))
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and out == "" and len(lines) == 1 and says in lines[0]


def test_a_mistyped_method_needs_no_torch(folder):
    code = (
        "import sys; from mmllm.cli.main import main\n"
        "try: main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "chat", str(folder), "-q", "x", "--decode", "greddy"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "did you mean 'greedy'" in done.stderr, done.stderr


def test_a_session_goes_on_after_mistakes(folder, parts, capsys):
    chat = Chat(Decoder(*parts), max_new_tokens=5)
    lines = ["hello", "/imge x", f"/image {folder / 'none.png'}", f"/image {folder / 'a.png'}", "/decode vcd:alpha=0.5"]
    talk(chat, [*lines, "What is it?", "And now?", "/quit", "never read"])
    out, err = capsys.readouterr()
    assert [line.split(":")[0] for line in err.splitlines()] == ["error", "error"]
    assert "did you mean '/image'" in err
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 3
    assert [p["type"] for p in chat.messages[2]["content"]] == ["image", "text"]
    assert str(chat.spec) == "vcd:alpha=0.5"
    # The third answer is about the whole conversation.
    request = Request(chat.messages[:5], chat.spec, 5)
    assert chat.messages[5]["content"] == Decoder(*parts).generate([request])[0].text
    talk(chat, ["/reset"])
    assert chat.messages == []


def test_a_session_reads_piped_input(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/quit\n"))
    code, out, _ = run(capsys, folder / "model", "--max-new-tokens", 3)
    assert code == 0 and out.endswith("\n")


def test_without_history_a_new_picture_replaces_the_old(folder, parts):
    chat = Chat(Decoder(*parts), max_new_tokens=2, history=False)
    chat.show("image", folder / "a.png")
    first = chat.ask("What is it?")
    assert chat.ask("What is it?") == first
    chat.show("image", folder / "a.png")
    assert chat.ask("What is it?") == first and chat.messages == []


def test_boxes_are_drawn_where_the_answer_says(folder, parts, tmp_path):
    chat = Chat(Decoder(*parts), boxes=tmp_path / "boxes.png")
    assert chat.draw("<box>0,0,9,9</box>") is None  # no picture was shown
    chat.show("image", folder / "a.png")
    assert chat.draw("a cat") is None
    assert chat.draw("at <box>250,250,750,750</box>") == tmp_path / "boxes.png"
    plain = draw_boxes(Image.open(folder / "a.png"), [])
    changed = np.asarray(Image.open(tmp_path / "boxes.png")).astype(int) != np.asarray(plain)
    rows, columns = np.nonzero(changed.any(-1))
    assert rows.min() == pytest.approx(plain.height / 4, abs=3) and rows.max() == pytest.approx(
        plain.height * 0.75, abs=3
    )
    assert columns.min() == pytest.approx(plain.width / 4, abs=3)


def test_several_pictures_are_announced_as_in_the_training_data(folder, parts):
    chat = Chat(Decoder(*parts), max_new_tokens=2)
    for kind, name in (("image", "a.png"), ("audio", "a.wav"), ("image", "a.png")):
        chat.show(kind, folder / name)
    chat.ask("Is there a cat in picture 2?")
    told = [part.get("text", part["type"]) for part in chat.messages[0]["content"]]
    assert told == ["Picture 1:", "image", "audio", "Picture 2:", "image", "Is there a cat in picture 2?"]


def test_an_empty_question_is_a_mistake(parts):
    with pytest.raises(UserError, match="empty"):
        Chat(Decoder(*parts)).ask("  ")
