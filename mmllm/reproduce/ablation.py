"""`mmllm reproduce starter`: what each part of the starter's recipe is worth, over seeds, at equal budgets."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from pydantic import Field

from mmllm.config import StrictModel, load_config
from mmllm.errors import UserError, unknown
from mmllm.report.figures import Figure, number, write_figures
from mmllm.reproduce.arms import Arm, Command, Step, run_command, train_arm
from mmllm.reproduce.effects.verdict import Interval, t_interval
from mmllm.reproduce.ledger import Ledger

CONFIG = "configs/starter/ablation.yaml"
MARK = re.compile(r"(<!-- ablation -->\n).*?(<!-- end ablation -->)", re.DOTALL)
EVAL_VERSION = 1  # raise it when the same model would get other figures


class Variant(StrictModel):
    """What an arm changes: key=value overrides of each stage.

    Attributes:
        says: the row's first cell.
    """

    says: str
    align: list[str] = []
    pretrain: list[str] = []
    tune: list[str] = []


class Plan(StrictModel):
    """configs/starter/ablation.yaml.

    Attributes:
        data: size of the starter dataset.
        seeds: how many training seeds.
        limit: scenes asked about in each split and task.
        tasks: of ``mmllm eval``.
        figures: name -> heading of its column.
        base: overrides of all arms; ``arms``: the first one is the recipe that the others are compared with.
    """

    data: str = "medium"
    seeds: int = Field(default=3, ge=1)
    limit: int = Field(default=100, ge=1)
    tasks: list[str]
    figures: dict[str, str]
    base: Variant
    arms: dict[str, Variant] = Field(min_length=1)


def arm_of(plan: Plan, name: str) -> Arm:
    """An arm's commands. All arms share one name, so that what two of them have in common is run once."""
    made = []
    for command in ("align", "pretrain", "tune"):
        own = [*getattr(plan.base, command), *getattr(plan.arms[name], command)]
        made.append(Step(command, f"configs/starter/{command}.yaml", tuple(own)))
    return Arm("starter", tuple(made))


def reproduce(
    out: Path,
    docs: Path,
    seeds: int | None = None,
    only: Sequence[str] = (),
    offline: bool = False,
    line: str = "mmllm reproduce starter",
    command: Command = run_command,
) -> Path:
    """Runs every arm with every seed, as far as that is not done yet, and writes the table; returns its page.

    Args:
        out: keeps finished runs; the same call goes on where it was stopped.
        docs: folder with ``starter.md``, whose table stands between two marks; ``starter_ablation.json`` beside it.
        only: names of arms; the recipe is always among them. Empty: all.

    Raises:
        UserError: an unknown arm; no page with marks; see the commands.
    """
    from mmllm.data.build import build_dataset

    plan = load_config(CONFIG, [], Plan)
    for name in only:
        if name not in plan.arms:
            raise unknown("arm", name, plan.arms, CONFIG)
    page = docs / "starter.md"
    if not page.is_file() or not MARK.search(page.read_text(encoding="utf-8")):
        raise UserError("has no marks for the table", page, "give --docs with the project's docs/starter.md")
    recipe = next(iter(plan.arms))
    arms = [name for name in plan.arms if not only or name in only or name == recipe]
    dataset = build_dataset("starter.yaml", plan.data, offline=offline)
    depends = {"dataset": json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))["recipe_hash"]}
    ledger = Ledger(out)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for seed in range(seeds or plan.seeds):
        for name in arms:
            run = train_arm(arm_of(plan, name), seed, dataset, ledger, depends, command)[-1]
            key = {"run": str(run), "tasks": plan.tasks, "limit": plan.limit, "version": EVAL_VERSION}
            folder = ledger.stage(f"starter-{name}-seed{seed}-eval", key, partial(_measure, run, dataset, plan))
            found[name].append(json.loads((folder / "figures.json").read_text(encoding="utf-8")))
            print(f"{name}, seed {seed}: " + ", ".join(f"{k} {v:.3f}" for k, v in found[name][-1].items()), flush=True)
    write_page(page, plan, found, line)
    return page


def _measure(run: Path, dataset: Path, plan: Plan, folder: Path) -> None:
    from mmllm.evaluate.run import run_eval

    figures = run_eval(run, dataset, plan.tasks, limit=plan.limit, shuffled=False, out=folder / "eval")
    values = {f.name: f.value for f in figures if f.name in plan.figures}
    if missing := sorted(set(plan.figures) - set(values)):
        raise UserError(f"mmllm eval gave no {missing[0]}", CONFIG, "name figures of the tasks")
    (folder / "figures.json").write_text(json.dumps(values), encoding="utf-8")


def differences(found: Mapping[str, Sequence[Mapping[str, float]]], name: str) -> dict[str, dict[str, Interval]]:
    """arm -> {"value", "difference" to the first arm, seed by seed} of one figure."""
    recipe = next(iter(found))
    base = [x[name] for x in found[recipe]]
    made = {}
    for arm, runs in found.items():
        values = [x[name] for x in runs]
        made[arm] = {"value": t_interval(values), "difference": t_interval([a - b for a, b in zip(values, base)])}
    return made


def write_page(page: Path, plan: Plan, found: Mapping[str, Sequence[Mapping[str, float]]], line: str) -> None:
    """The table between the page's marks, and ``starter_ablation.json`` beside the page."""
    recipe = next(iter(found))
    figures: list[Figure] = []
    rows = {arm: [plan.arms[arm].says] for arm in found}
    for name in plan.figures:
        for arm, about in differences(found, name).items():
            value, change = about["value"], about["difference"]
            cell = number(value.mean, "fraction")
            if arm != recipe:
                clear = value.n > 1 and (change.low > 0 or change.high < 0)
                shown = f"{100 * change.mean:+.1f}"
                cell += f" (**{shown}**)" if clear else f" ({shown})"
            rows[arm].append(cell)
            figures.append(Figure(f"{arm}/{name}", value.mean, n=value.n))
            if arm != recipe and value.n > 1:
                figures.append(
                    Figure(f"{arm}/{name}_over_recipe", change.mean, low=change.low, high=change.high, n=value.n)
                )
    heads = ["what changes", *plan.figures.values()]
    table = [f"| {' | '.join(heads)} |", "|---" + "|---:" * len(plan.figures) + "|"]
    table += [f"| {' | '.join(cells)} |" for cells in rows.values()]
    seeds = len(found[recipe])
    about = (
        f"`{line}`: means over {seeds} seeds of the starter's {plan.data} size, {plan.limit} scenes a task. In "
        "brackets the paired difference to the recipe in points, bold where its 95 % interval (t over seeds) leaves "
        "out zero."
    )
    text = page.read_text(encoding="utf-8")
    block = "\n".join([*table, "", about])
    page.write_text(MARK.sub(lambda m: f"{m[1]}\n{block}\n\n{m[2]}", text), encoding="utf-8")
    write_figures(page.with_name("starter_ablation.json"), line, 0, None, [], figures)
