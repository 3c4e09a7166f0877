# Everything that a fresh clone needs: 'make demo' and 'make test'. Both install into .venv first, once.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
# Waiting OpenMP threads spin: two busy cores get ten times slower. One thread per process is the fast choice there.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install demo test test-demo test-full-size test-browser test-load lint format bench clean

install: .venv/installed

.venv/installed: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; this is $$($(PYTHON) --version). Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "Installing into .venv: this takes a few minutes, once."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: install
	$(BIN)/python examples/demo.py $(ARGS)

test: install
	$(BIN)/python -m pytest $(or $(ARGS),-n 2 --dist loadfile --cov=modeling_clip_phi --cov-fail-under=95)

test-demo: install
	$(BIN)/python -m pytest -m demo $(ARGS)

test-full-size: install
	$(BIN)/python -m pytest -m full_size $(ARGS)

# The chat page in Chromium. ARGS='--screenshots docs/chat' takes the documentation's pictures anew.
test-browser: install
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium >/dev/null; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,chat]' playwright
	$(BIN)/python -m pytest -m browser $(ARGS)

test-load: install
	$(BIN)/python -m pytest -m load $(ARGS)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install
	$(BIN)/python benchmarks/training.py $(or $(ARGS),--quick)

clean:
	rm -rf .venv outputs build *.egg-info
