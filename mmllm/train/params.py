"""Which parameters train, at which rate: groups, the table shown before step 0, and the check that it is true."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mmllm.train.launch import is_main


@dataclass
class ParamGroup:
    """Parameters that train together.

    Attributes:
        name: what the table and the log call it, such as ``connector`` or ``llm.lora``.
        params: the parameters.
        lr: their learning rate; None: the section's ``learning_rate``.
        weight_decay: None: the section's; vectors and scalars (biases, norms, logit scales) are never decayed.
    """

    name: str
    params: list[nn.Parameter]
    lr: float | None = None
    weight_decay: float | None = None


def as_groups(groups: Iterable[ParamGroup | tuple]) -> list[ParamGroup]:
    """ParamGroups from ParamGroups or ``(name, params, lr)`` tuples; empty groups are dropped."""
    made = [g if isinstance(g, ParamGroup) else ParamGroup(g[0], list(g[1]), *g[2:]) for g in groups]
    for group in made:
        group.params = list(group.params)
    return [g for g in made if g.params]


def set_trainable(model: nn.Module, groups: Sequence[ParamGroup | tuple]) -> list[ParamGroup]:
    """Freezes everything in ``model`` but the parameters of ``groups``; returns the groups."""
    made = as_groups(groups)
    model.requires_grad_(False)
    for group in made:
        for p in group.params:
            p.requires_grad_(True)
    check_trainable(model, made)
    return made


def check_trainable(model: nn.Module, groups: Sequence[ParamGroup]) -> None:
    """Makes sure that exactly the parameters of ``groups`` train.

    Raises:
        ValueError: a parameter trains without a group, stands in two groups, is frozen in a group, or is not part of
            the model; the message names it.
    """
    names = {id(p): n for n, p in model.named_parameters()}
    owner: dict[int, str] = {}
    for group in groups:
        for p in group.params:
            if id(p) not in names:
                raise ValueError(f"group '{group.name}' holds a parameter of shape {tuple(p.shape)} outside the model")
            if id(p) in owner:
                raise ValueError(f"{names[id(p)]} stands in two groups: '{owner[id(p)]}' and '{group.name}'")
            if not p.requires_grad:
                raise ValueError(f"{names[id(p)]} of group '{group.name}' is frozen")
            owner[id(p)] = group.name
    loose = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in owner]
    if loose:
        raise ValueError(f"{len(loose)} parameters would train outside any group, first {loose[0]}")


def _part(model: nn.Module, name: str) -> str:
    """The part of the model that a parameter belongs to: wrappers are left out, dictionaries of modules opened."""
    shown: list[str] = []
    module = model
    for step in name.split(".")[:-1]:
        module = getattr(module, step)
        if step not in ("model", "base_model", "module"):
            shown.append(step)
        if shown and not isinstance(module, nn.ModuleDict):
            break
    return ".".join(shown) or name.split(".", 1)[0]


def count_parameters(model: nn.Module, groups: Sequence[ParamGroup]) -> list[dict]:
    """Rows ``{"part", "trainable", "frozen", "lr"}``: one per group, then one per part with frozen ones."""
    rows = [
        {"part": g.name, "trainable": sum(p.numel() for p in g.params), "frozen": 0, "lr": g.lr}
        for g in as_groups(groups)
    ]
    frozen: dict[str, int] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            part = _part(model, name)
            packed = type(p).__name__ == "Params4bit" and p.dtype == torch.uint8  # two numbers a byte
            frozen[part] = frozen.get(part, 0) + p.numel() * (2 if packed else 1)
    by_part = {row["part"]: row for row in rows}
    for part, count in frozen.items():
        if part in by_part:
            by_part[part]["frozen"] = count
        else:
            rows.append({"part": part, "trainable": 0, "frozen": count, "lr": None})
    return rows


def print_trainable(model: nn.Module, groups: Sequence[ParamGroup | tuple], learning_rate: float | None = None) -> None:
    """Prints what trains and what is frozen, and checks that it is so.

    Args:
        learning_rate: shown for groups without a rate of their own.

    Raises:
        ValueError: see ``check_trainable``.
    """
    made = as_groups(groups)
    check_trainable(model, made)
    if not is_main():
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="What trains", title_justify="left")
    for column in ("part", "trainable", "frozen", "learning rate"):
        table.add_column(column, justify="left" if column == "part" else "right")
    rows = count_parameters(model, made)
    for row in rows:
        lr = row["lr"] if row["lr"] is not None else learning_rate
        rate = f"{lr:g}" if row["trainable"] and lr is not None else "-"
        table.add_row(row["part"], f"{row['trainable']:,}", f"{row['frozen']:,}", rate)
    table.add_section()
    table.add_row("all", f"{sum(r['trainable'] for r in rows):,}", f"{sum(r['frozen'] for r in rows):,}", "")
    Console().print(table)
