"""What the benchmarks against open_clip share: the environment of both sides, paired runs, and peak memory."""

from __future__ import annotations

import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmllm.report.figures import Figure

ROOT = Path(__file__).resolve().parents[1]
OPEN_CLIP = "3.3.0"


def enter() -> None:
    """Runs this command again in the environment of ``scripts/open_clip_env.sh``, unless it runs there already.

    The environment is the folder MMLLM_BENCH_ENV, else ``.bench-venv`` in the checkout.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        here = importlib.metadata.version("open_clip_torch")
    except importlib.metadata.PackageNotFoundError:
        here = None
    if here == OPEN_CLIP:
        return
    place = Path(os.environ.get("MMLLM_BENCH_ENV") or ROOT / ".bench-venv")
    python = place / "bin/python"
    if here is not None or not python.is_file():
        found = f"open_clip {here}" if here else "no open_clip"
        sys.exit(f"error: {found} here, no environment in {place}; make it: sh scripts/open_clip_env.sh {place}")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.execve(python, [str(python), *sys.argv], os.environ | {"PYTHONPATH": path})


def child(arguments: Sequence[str], threads: int, **env: str) -> dict[str, Any]:
    """What this script, called again in a process of its own, prints as JSON on its last line."""
    done = subprocess.run(
        [sys.executable, sys.argv[0], *arguments],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)} | env,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def clip_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer of transformers, from the vocabulary in open_clip's package; saved in ``folder``."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    own = SimpleTokenizer()
    start, end = own.decoder[own.sot_token_id], own.decoder[own.eot_token_id]
    merges: Any = list(own.bpe_ranks)  # in the order of their ranks
    marks = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    made = CLIPTokenizer(vocab=dict(own.encoder), merges=merges, **marks)
    made.save_pretrained(folder)
    return made


def clock(run: Callable[[], Any]) -> float:
    """Seconds that ``run()`` takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def turns(first: Callable[[], float], second: Callable[[], float], pairs: int) -> list[tuple[float, float]]:
    """Both in turn, the order changing from pair to pair."""
    found = []
    for i in range(pairs):
        if i % 2:
            a, b = first(), second()
        else:
            b, a = second(), first()
        found.append((a, b))
    return found


def figure(
    name: str, measured: Sequence[tuple[float, float]], better: str, target: float, unit: str, note: str
) -> Figure:
    """Median over pairs of ours over the other's, with the smallest and largest pair, and what each needed.

    Args:
        measured: (the other's, ours) for each pair.
        better: "lower" for what costs (seconds, MiB), "higher" for rates.
    """
    from mmllm.report.figures import Figure

    ratios = sorted(ours / other for other, ours in measured)
    value = statistics.median(ratios)
    other, ours = (statistics.median(x) for x in zip(*measured))
    return Figure(
        name, value, better, ratios[0], ratios[-1], len(ratios), "ratio", target=target,
        verdict="met" if (value <= target if better == "lower" else value >= target) else "missed",
        arms={"theirs": round(other, 3), "ours": round(ours, 3), "unit": unit},
        note=f"{other:.3g} -> {ours:.3g} {unit}; {note}",
    )  # fmt: skip


def publish(file: str | None, command: str, figures: Sequence[Figure], **about: Any) -> None:
    """Writes the figures to ``file``, and the tables of docs/performance.md from the files that it names."""
    from mmllm.report.figures import write_figures

    for f in figures:
        print(f"{f.name}: {f.note}")
    if file:
        write_figures(file, command, 0, None, None, figures, **about)
        subprocess.run([sys.executable, "scripts/render_tables.py", "docs/performance.md"], cwd=ROOT, check=True)


def peak_extra_mb(run: Callable[[], Any]) -> float:
    """Highest resident memory during ``run()`` above that before it, in MiB (Linux)."""
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to the present
    run()
    return _resident("VmHWM") - before


def _resident(key: str) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) / 1024
