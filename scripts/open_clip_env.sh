#!/bin/sh
# Sets up the one environment in which benchmarks and tests run against open_clip and timm.
#
#   sh scripts/open_clip_env.sh [FOLDER]        (default: .bench-venv; PYTHON=... chooses the interpreter)
#
# Why a separate one: open_clip needs torchvision, and PyPI has torchvision only for the CUDA build of torch, which also
# runs on a CPU but takes some 6 GB. Both sides of a comparison run here, on the same torch. The folder holds the project's
# dependencies, not the project: a benchmark puts its own checkout on the path. Set MMLLM_BENCH_ENV to a folder that is
# not the default. pip's own settings (indexes, wheel folders, cache) apply. Run again, it finds everything in place.
set -eu

cd "$(dirname "$0")/.."
FOLDER=${1:-.bench-venv}
[ -x "$FOLDER/bin/python" ] || "${PYTHON:-python3}" -m venv "$FOLDER"

WANTED=$(mktemp)
LIMITS=$(mktemp)
trap 'rm -f "$WANTED" "$LIMITS"' EXIT
"$FOLDER/bin/python" -c '
import tomllib
with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["project"]["dependencies"], sep="\n")' > "$WANTED"
# The versions that the project is tested with, but for torch, which must be the one that torchvision goes with, and for
# webdataset, of which open_clip takes older ones.
grep -v -e '^torch' -e '^webdataset' constraints/cpu.txt > "$LIMITS"
"$FOLDER/bin/python" -m pip install --quiet -c "$LIMITS" -r "$WANTED" \
    open_clip_torch==3.3.0 torch==2.14.1 torchvision==0.29.1 "webdataset<=0.2.86" pandas timm pytest hypothesis

# A broken install must show here, not in the middle of a benchmark.
"$FOLDER/bin/python" -W ignore -c '
import open_clip, torch, torchvision
print(f"open_clip {open_clip.__version__} beside torch {torch.__version__}, torchvision {torchvision.__version__}")'
