"""The terminal chat: keeps the conversation, streams answers, draws the boxes of an answer into the picture."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmllm.data.questions import picture_prefix
from mmllm.decode.parse import parse_spec
from mmllm.decode.spec import DecodeSpec
from mmllm.errors import UserError, nearest

if TYPE_CHECKING:
    from mmllm.decode import Decoder, Request, Result

HELP = """\
  /image PATH     show a picture with the next question
  /audio PATH     play a sound with the next question
  /decode METHOD  greedy, sample:temperature=0.7, vcd:alpha=1, ritual:transform=hflip, ...
  /reset          forget the conversation
  /quit           leave (or Ctrl-D)"""
COMMANDS = ("image", "audio", "decode", "reset", "help", "quit", "exit")
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080")


class Chat:
    """A conversation with a model.

    Args:
        decoder: the model's decoder.
        decode: decoding method.
        max_new_tokens: most tokens of an answer.
        seed: of sampling and of noised views.
        boxes: where the picture with the answer's boxes goes; None writes NAME.boxes.png into the current folder.
        history: send earlier questions and answers along; without it only their pictures and sounds.
    """

    def __init__(
        self,
        decoder: Decoder,
        decode: str | DecodeSpec = "greedy",
        max_new_tokens: int = 128,
        seed: int = 0,
        boxes: Path | None = None,
        history: bool = True,
    ):
        self.decoder, self.spec, self.max_new_tokens, self.seed = decoder, parse_spec(decode), max_new_tokens, seed
        self.boxes, self.history = boxes, history
        self.messages: list[dict[str, Any]] = []
        self.pending: list[dict[str, Any]] = []
        self.picture: Path | None = None
        self._asked = False

    def show(self, kind: str, path: str | Path) -> None:
        """Keeps a picture or sound for the next question.

        Raises:
            UserError: not readable, or the model was built without this modality.
        """
        from mmllm.data.media import load_audio, load_image

        takes = self.decoder.encoder.placeholder_ids
        if kind not in takes:
            raise UserError(f"this model takes no {kind}", do=f"it takes: {', '.join(['text', *takes])}")
        path = Path(path).expanduser()
        if self._asked and not self.history:  # what is shown anew replaces what was asked about
            self.pending, self._asked = [], False
        if kind == "image":
            load_image(path)
            self.picture = path
        else:
            load_audio(path, self.decoder.encoder.sampling_rate)
        self.pending.append({"type": kind, kind: str(path)})

    def ask(self, question: str, on_piece: Callable[[str], None] | None = None) -> Result:
        """Answers a question about all that was said and shown so far; the answer joins the conversation.

        Raises:
            UserError: the question is empty.
        """
        request = self.request(question)
        turn = request.messages[-1]
        streamer = None if on_piece is None else lambda _, piece: on_piece(piece)
        result = self.decoder.generate([request], streamer)[0]
        self._asked = True
        if self.history:
            self.messages = [*self.messages, turn, {"role": "assistant", "content": result.text}]
            self.pending = []
        return result

    def request(self, question: str) -> Request:
        """The question after all that was said and shown so far.

        Raises:
            UserError: the question is empty.
        """
        from mmllm.decode import Request

        if not question.strip():
            raise UserError("the question is empty", do="write one after -q, or a line in the chat")
        turn = {"role": "user", "content": [*announced(self.pending), {"type": "text", "text": question.strip()}]}
        return Request([*self.messages, turn], self.spec, self.max_new_tokens, self.seed)

    def reset(self) -> None:
        """Forgets questions, answers, pictures and sounds."""
        self.messages, self.pending, self.picture = [], [], None

    def draw(self, answer: str) -> Path | None:
        """Saves the last picture with the answer's boxes drawn in; None when there is no picture or no box."""
        from mmllm.data.media import load_image
        from mmllm.evaluate.grounding import parse_boxes

        found = parse_boxes(answer)
        if not found or self.picture is None:
            return None
        target = self.boxes or Path(f"{self.picture.stem}.boxes.png")
        draw_boxes(load_image(self.picture), found).save(target)
        return target


def announced(media: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Media parts as the starter data has them: several pictures each get a "Picture k:", a single one none."""
    pictures = [part for part in media if part["type"] == "image"]
    if len(pictures) < 2:
        return media
    numbered = iter(picture_prefix([part["image"] for part in pictures])[0]["content"])
    return [p for part in media for p in ([next(numbered), next(numbered)] if part["type"] == "image" else [part])]


def draw_boxes(image: Any, boxes: Iterable[tuple[float, float, float, float]]) -> Any:
    """The picture with boxes (x0, y0, x1, y1 in 0..1) drawn in, enlarged if it is small."""
    from PIL import Image, ImageDraw

    scale = max(1, round(480 / max(image.size)))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(image)
    width = max(2, max(image.size) // 160)
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        corners = (x0 * image.width, y0 * image.height, x1 * image.width, y1 * image.height)
        pen.rectangle(corners, outline=COLOURS[i % len(COLOURS)], width=width)
    return image


def answer(chat: Chat, question: str) -> None:
    """Asks and prints the answer as it is made, then where its boxes were drawn."""
    result = chat.ask(question, lambda piece: print(piece, end="", flush=True))
    print(flush=True)
    drawn = chat.draw(result.text)
    if drawn is not None:
        print(f"boxes drawn into {drawn}", file=sys.stderr)


def talk(chat: Chat, lines: Iterable[str] | None = None) -> None:
    """Reads questions and /commands until /quit or the end of input; a mistake is told and the chat goes on."""
    terminal = lines is None and sys.stdin.isatty()
    if terminal:
        print(f"Ask, or show something first. /help lists the commands.\n{HELP}")
    for line in _typed() if terminal else (lines if lines is not None else sys.stdin):
        line = line.strip()
        if not line:
            continue
        try:
            if not line.startswith("/"):
                answer(chat, line)
            elif not _command(chat, line):
                return
        except UserError as e:
            print(f"error: {e}", file=sys.stderr)


def _typed() -> Iterable[str]:
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history in input())
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _command(chat: Chat, line: str) -> bool:
    """Runs a /command; False when the chat shall end."""
    name, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    if name not in COMMANDS:
        near = nearest(name, COMMANDS)
        raise UserError(f"no command '/{name}'", do=f"did you mean '/{near}'?" if near else "see /help")
    if name in ("quit", "exit"):
        return False
    if name in ("image", "audio"):
        if not rest:
            raise UserError(f"/{name} needs a path")
        chat.show(name, rest.strip("'\""))
        print(f"({name} {rest} goes with the next question)")
    elif name == "decode":
        chat.spec = parse_spec(rest)
        print(f"(decoding: {chat.spec}, logits times {chat.spec.gain:g} where the views agree)")
    elif name == "reset":
        chat.reset()
        print("(forgotten)")
    else:
        print(HELP)
    return True
