"""The classes that lmms-eval loads by the entry point of :func:`mmllm.evaluate.lmms.manifest`."""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

from lmms_eval.api.model import lmms

from mmllm.errors import UserError
from mmllm.evaluate.lmms import VIDEO_FRAMES, Bridge, world

IGNORED = {"batch_size", "max_batch_size", "device"}  # lmms-eval always hands these on; our decoder batches by itself


class MmllmSimple(lmms):
    """``--model mmllm --force_simple --model_args pretrained=runs/tune,decode=vcd``: generation and likelihood.

    Args:
        pretrained: run folder or model folder.
        decode: decoding method; its keys are parted by ``;`` here, since lmms-eval parts arguments by commas.
        video_frames: frames that stand for a video.

    Raises:
        UserError: no model, an unknown argument, or more than one process.
    """

    is_simple = True

    def __init__(
        self, pretrained: str = "", decode: str = "greedy", video_frames: int = VIDEO_FRAMES, **more: Any
    ) -> None:  # fmt: skip
        from mmllm.evaluate.answer import load_decoder

        unknown = sorted(set(more) - IGNORED - {"decoder"})
        if unknown:
            raise UserError(f"unknown argument '{unknown[0]}'", "--model_args", "give pretrained, decode, video_frames")
        if world()[1] > 1:
            raise UserError("lmms-eval runs our models in one process", "accelerate launch", "start it with python -m")
        self.pretrained = str(pretrained)
        super().__init__()
        decoder = more.get("decoder") or load_decoder(pretrained or None)
        self.bridge = Bridge(decoder, str(decode).replace(";", ","), int(video_frames))

    def generate_until(self, requests: list[Any]) -> list[str]:
        return self._generate(requests, self.bridge.simple, 1)

    def _generate(self, requests: list[Any], read: Any, place: int) -> list[str]:
        messages = [read(r, self.task_dict) for r in requests]
        settings = [r.args[place] for r in requests]
        answers = self.bridge.generate(messages, settings)
        for request, setting, answer in zip(requests, settings, answers, strict=True):
            self.cache_hook.add_partial("generate_until", (request.args[0], setting), answer)
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        messages = [self.bridge.simple(r, self.task_dict) for r in requests]
        return self.bridge.likelihood(messages, [self.bridge.target(r, self.task_dict) for r in requests])

    def generate_until_multi_round(self, requests: list[Any]) -> list[list[str]]:
        return self.bridge.rounds(requests, self.task_dict)


class MmllmChat(MmllmSimple):
    """The same for tasks that give whole conversations; lmms-eval asks such models for generation only."""

    is_simple = False

    def generate_until(self, requests: list[Any]) -> list[str]:
        return self._generate(requests, self.bridge.chat, 2)
