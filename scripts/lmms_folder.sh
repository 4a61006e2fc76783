#!/bin/sh
# Puts lmms-eval, and of its dependencies those that its runner imports, into a folder of their own.
#
#   sh scripts/lmms_folder.sh [PYTHON] [FOLDER]        (default: .venv/bin/python .lmms)
#
# Why not `pip install mmllm[lmms]`: lmms-eval asks for torchvision and pins many packages, which would change the
# environment that everything else is tested in. `PYTHONPATH=FOLDER` puts the folder before that environment.
set -eu

cd "$(dirname "$0")/.."
PYTHON=${1:-.venv/bin/python}
FOLDER=${2:-.lmms}
[ -f "$FOLDER/.done" ] || "$PYTHON" -m pip install --quiet --no-deps --upgrade --target "$FOLDER" \
    lmms-eval==0.7.3 "av<16" evaluate jsonlines numexpr openai hf_transfer nltk yt-dlp pycocoevalcap tqdm-multiprocess \
    zstandard latex2sympy2 openpyxl loguru tenacity zss python-dotenv sqlitedict ftfy wcwidth sacrebleu portalocker \
    tabulate colorama lxml pytz pytablewriter typepy DataProperty mbstrdecoder pathvalidate tabledata tcolorpy
PYTHONPATH="$FOLDER" "$PYTHON" -W ignore -c 'import lmms_eval.evaluator'
touch "$FOLDER/.done"
