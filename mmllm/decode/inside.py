"""Reaches into an LLM while it runs: early layers' states, steering behind the MLPs, media embeddings set to zero."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.decode.layers import layer_numbers
from mmllm.decode.prompts import Row
from mmllm.decode.spec import Tap
from mmllm.errors import UserError


@dataclass
class Frame:
    """Where things stand in one forward of R rows.

    Attributes:
        rows: per row of the batch.
        media: per row, the columns of its media tokens among the keys.
        queries: per row, the columns (of this forward's tokens) that predict something.
        media_queries: per row, the columns of its media tokens among this forward's tokens; empty after the prefill.
    """

    rows: Sequence[Row]
    media: Sequence[list[int]]
    queries: Sequence[list[int]]
    media_queries: Sequence[list[int]] = ()


@dataclass
class Captured:
    """States [n, H] of layer outputs at the wanted places, by layer number from 1."""

    states: dict[int, Tensor] = field(default_factory=dict)


class Inside:
    """The parts of a causal LM (or of the LLM in a multimodal model) that decoding methods reach for.

    Raises (when one of them is asked for):
        UserError: the model is not built of layers with ``self_attn`` and ``mlp``.
    """

    def __init__(self, model: Any):
        self.model = model

    @cached_property
    def trunk(self) -> tuple[Any, nn.ModuleList]:
        """The module that holds the decoder layers, and the layers."""
        depth = self.model.config.get_text_config().num_hidden_layers
        for module in self.model.modules():
            layers = getattr(module, "layers", None)
            if isinstance(layers, nn.ModuleList) and len(layers) == depth and hasattr(module, "norm"):
                if all(hasattr(layer, "self_attn") and hasattr(layer, "mlp") for layer in layers):
                    return module, layers
        raise UserError(f"this method does not know the inside of {type(self.model).__name__}", "decode",
                        "use a method that only changes the prompt, such as vcd")  # fmt: skip

    @property
    def layers(self) -> nn.ModuleList:
        return self.trunk[1]

    def tap_layers(self, tap: Tap) -> list[int]:
        """The layers of a tap, numbered from 1."""
        tied = bool(getattr(self.model.config.get_text_config(), "tie_word_embeddings", False))
        return layer_numbers(tap.layers, len(self.layers), tied)

    def tap_logits(self, tap: Tap, captured: Captured, places: Tensor | slice = slice(None)) -> Tensor:
        """Logits [n, layers, V] of a tap from captured states, at some of the captured places."""
        states = torch.stack([captured.states[number][places] for number in self.tap_layers(tap)], dim=1)
        return self.model.get_output_embeddings()(self.trunk[0].norm(states) if tap.norm else states)

    @contextmanager
    def captured(self, taps: Sequence[Tap], rows: Tensor, columns: Tensor) -> Iterator[Captured]:
        """Within, a forward leaves the states of all layers that the taps may choose, at (rows[i], columns[i])."""
        wanted = sorted({number for tap in taps for number in self.tap_layers(tap)})
        with self.states_at(wanted, rows, columns) as found:
            yield found

    @contextmanager
    def states_at(self, wanted: Sequence[int], rows: Tensor, columns: Tensor) -> Iterator[Captured]:
        """The same for layers by number."""
        found = Captured()

        def keep(number: int) -> Any:
            def hook(_: nn.Module, __: Any, out: Any) -> None:
                found.states[number] = (out[0] if isinstance(out, tuple) else out)[rows, columns]

            return hook

        with ExitStack() as stack:
            for number in wanted:
                stack.callback(self.layers[number - 1].register_forward_hook(keep(number)).remove)
            yield found

    @contextmanager
    def changed(self, frame: Frame) -> Iterator[None]:
        """Within, a forward treats each row as its operations say."""
        from mmllm.decode.attention import row_attention

        names = {op.name for row in frame.rows for op in row.model}
        with ExitStack() as stack:
            if names & {"boost", "prune"}:
                stack.enter_context(row_attention(self, frame))
            if names & {"steer", "steer_image"}:
                self._steer(stack, frame)
            if "blind" in names and any(frame.media_queries):
                self._blind(stack, frame)
            yield

    def _steer(self, stack: ExitStack, frame: Frame) -> None:
        """x -> |x| norm(norm(x) + scale norm(d)) behind every MLP, for the rows with directions."""
        steered = [(r, row, op) for r, row in enumerate(frame.rows) for op in row.model if op.name.startswith("steer")]

        def hook_of(layer: int) -> Any:
            def hook(_: nn.Module, __: Any, out: Tensor) -> Tensor:
                out = out.clone()
                for r, row, op in steered:
                    assert row.directions is not None
                    direction = F.normalize(row.directions[layer].to(out.device, torch.float32), dim=-1)
                    x = out[r].float()
                    turned = F.normalize(F.normalize(x, dim=-1) + op["scale"] * direction, dim=-1)
                    out[r] = (turned * x.norm(dim=-1, keepdim=True)).to(out.dtype)
                return out

            return hook

        for i, layer in enumerate(self.layers):
            stack.callback(layer.mlp.register_forward_hook(hook_of(i)).remove)  # type: ignore[union-attr]

    def _blind(self, stack: ExitStack, frame: Frame) -> None:
        """Sets the embeddings of the media tokens that ``blind`` removes to zero."""

        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            embeds = kwargs["inputs_embeds"].clone()
            for r, row in enumerate(frame.rows):
                if row.kept is not None:
                    columns = torch.tensor(frame.media_queries[r])
                    embeds[r, columns[~row.kept]] = 0
            return args, {**kwargs, "inputs_embeds": embeds}

        stack.callback(self.trunk[0].register_forward_pre_hook(hook, with_kwargs=True).remove)
