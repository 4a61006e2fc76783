"""EfficientNet-Lite0 as a vision tower: the ImageNet network that is small enough for a laptop's CPU."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from mmllm.blocks.transformer import tapped
from mmllm.contracts import Features, Tower
from mmllm.towers.image_processing import MMLLMImageProcessor

# (repeats, kernel, stride, expansion, channels in, channels out) of the seven stages of the Lite0 release.
STAGES = [
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
]
STRIDE = 32


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding, which the published weights were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        k, s = self.kernel_size[0], self.stride[0]
        if s == 1:
            return F.conv2d(x, self.weight, self.bias, 1, k // 2, 1, self.groups)
        h, w = x.shape[-2:]
        pad_h, pad_w = max((-(-h // s) - 1) * s + k - h, 0), max((-(-w // s) - 1) * s + k - w, 0)
        x = F.pad(x, (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2))
        return F.conv2d(x, self.weight, self.bias, s, 0, 1, self.groups)


def _fold(module: Any, pairs: Sequence[tuple[str, str]]) -> None:
    """Replaces each named convolution by one with its BatchNorm's stored statistics in it, and the norm by nothing."""
    for conv, norm in pairs:
        if hasattr(module, conv):
            setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
            setattr(module, norm, nn.Identity())


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class InvertedResidual(nn.Module):
    """Expand, depthwise, project; the attribute names are those of the published checkpoint."""

    def __init__(self, kernel: int, stride: int, expansion: int, width_in: int, width_out: int):
        super().__init__()
        middle = width_in * expansion
        self.expands, self.skips = expansion > 1, stride == 1 and width_in == width_out
        if self.expands:
            self._expand_conv, self._bn0 = nn.Conv2d(width_in, middle, 1, bias=False), _norm(middle)
        self._depthwise_conv = SameConv2d(middle, middle, kernel, stride, groups=middle, bias=False)
        self._bn1 = _norm(middle)
        self._project_conv, self._bn2 = nn.Conv2d(middle, width_out, 1, bias=False), _norm(width_out)

    def forward(self, x: Tensor) -> Tensor:
        # In place: nobody else reads the convolutions' outputs, and memory is what this network waits for on a CPU.
        h = F.relu6(self._bn0(self._expand_conv(x)), inplace=True) if self.expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)), inplace=True)
        h = self._bn2(self._project_conv(h))
        return h + x if self.skips else h


class EfficientNetLite0Tower(Tower):
    """ImageNet features on a grid of one token per 32x32 pixels; ``pooled`` is their mean.

    BatchNorm always runs on its stored statistics: batches of a fine-tuning run are too small and too alike.
    """

    modality = "vision"
    hidden_size = 1280

    def __init__(self, image_size: int = 192):
        super().__init__()
        self.image_size = image_size
        self._conv_stem, self._bn0 = SameConv2d(3, 32, 3, 2, bias=False), _norm(32)
        blocks: list[nn.Module] = []
        for repeats, kernel, stride, expansion, width_in, width_out in STAGES:
            for i in range(repeats):
                first = i == 0
                blocks.append(
                    InvertedResidual(
                        kernel, stride if first else 1, expansion, width_in if first else width_out, width_out
                    )
                )
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = nn.Conv2d(320, self.hidden_size, 1, bias=False), _norm(self.hidden_size)
        self.train(False)

    def train(self, mode: bool = True) -> EfficientNetLite0Tower:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.training = False
        return self

    def forward(self, pixel_values: Tensor, layers: Sequence[int] = (), **_: Any) -> Features:
        """pixel_values [B, 3, H, W] -> tokens [B, ceil(H/32) * ceil(W/32), 1280].

        Layers have the grid and width of their own block.
        """
        x = pixel_values.to(self._conv_stem.weight.dtype)
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)  # 1.6 times faster on CPUs
        x = F.relu6(self._bn0(self._conv_stem(x)), inplace=True)
        states = [x]
        for block in self._blocks:
            x = block(x)
            if layers:
                states.append(x)
        x = F.relu6(self._bn1(self._conv_head(x)), inplace=True)
        tokens = x.flatten(2).transpose(1, 2)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        taps = tapped([s.flatten(2).transpose(1, 2) for s in states], layers) if layers else None
        return Features(tokens, mask, tokens.mean(1), grid=(1, x.shape[2], x.shape[3]), layers=taps)

    def frozen_copy(self) -> EfficientNetLite0Tower:
        """The same function without BatchNorm layers; ``benchmarks/tune_speed.py`` measures what that is worth."""
        twin = copy.deepcopy(self).eval()
        _fold(twin, [("_conv_stem", "_bn0"), ("_conv_head", "_bn1")])
        for block in twin._blocks:
            _fold(block, [("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")])
        return twin

    def num_tokens(self, length: Any = None) -> int:
        return (-(-self.image_size // STRIDE)) ** 2

    @property
    def grid(self) -> tuple[int, int, int]:
        side = -(-self.image_size // STRIDE)
        return (1, side, side)

    def to_config(self) -> dict[str, Any]:
        return {"model_type": "efficientnet_lite0", "modality": "vision", "image_size": self.image_size}

    def preprocessor(self) -> MMLLMImageProcessor:
        return MMLLMImageProcessor(image_size=self.image_size)
