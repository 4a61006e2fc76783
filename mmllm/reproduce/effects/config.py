"""The config of an effect: what a method claims, the runs that would show it, and what counts as shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from mmllm.config import StrictModel, find_config, load_config
from mmllm.errors import UserError, unknown

FOLDER = "effects"


class EffectConfig(StrictModel):
    """``configs/effects/SLUG.yaml``; seeds, budget and direction are written down before the first run.

    Attributes:
        claim: what should show, in a sentence.
        data: what the arms see: ``starter`` pictures and sounds (with recipes on them), or ``drawn`` ones.
        config: an align config that all arms share.
        arms: name -> what differs from ``config`` (keys go deep, lists are replaced).
        compare: (method, baseline), two of the arms.
        metric: a figure of the runs' results, or ``log/NAME``: the last logged value of a term.
        better: whether the method should have more or less of it.
        also: further figures for the table.
        seeds: how many; training and data recipes take them as ``${train.seed}``.
        minutes: budget of all arms and seeds together, on two CPU cores.
        quick: settings for ``--quick``, besides two seeds; ``full``: those of ``--full``.
        notes: what a reader of the verdict should know: what was tried where it is noise or opposite.
    """

    claim: str
    data: Literal["starter", "drawn"]
    config: dict[str, Any]
    arms: dict[str, dict[str, Any]] = Field(min_length=2)
    compare: tuple[str, str]
    metric: str
    better: Literal["higher", "lower"] = "higher"
    also: list[str] = Field(default_factory=list)
    seeds: int = Field(default=5, ge=2)
    minutes: float = Field(gt=0)
    quick: dict[str, Any] = Field(default_factory=dict)
    full: dict[str, Any] = Field(default_factory=dict)
    notes: str = ""

    @model_validator(mode="after")
    def _compares_arms(self) -> EffectConfig:
        for name in self.compare:
            if name not in self.arms:
                raise unknown("arm", name, self.arms, "compare")
        return self

    def settings(self, arm: str, seed: int, size: Literal["quick", "normal", "full"] = "normal") -> dict[str, Any]:
        """The whole align config of an arm, as plain data.

        Raises:
            UserError: an interpolation that leads nowhere.
        """
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        parts = [self.config, self.arms[arm], {} if size == "normal" else getattr(self, size)]
        merged = OmegaConf.merge(*parts, {"train": {"seed": seed}})
        try:
            return OmegaConf.to_container(merged, resolve=True)  # type: ignore[return-value]
        except OmegaConfBaseException as e:
            raise UserError(str(e).splitlines()[0], f"arm '{arm}'", "check the interpolations") from None


def effect(slug: str) -> EffectConfig:
    """The effect config of a method.

    Raises:
        UserError: no such method, or no config for it.
    """
    return load_config(effect_file(slug), (), EffectConfig, resolve=False)  # seeds come later


def effect_file(slug: str) -> Path:
    """Where the effect config of a method stands.

    Raises:
        UserError: no such method, or no config for it.
    """
    from mmllm.methods import card

    return card(slug).effect or find_config(f"configs/{FOLDER}/{slug}.yaml")
