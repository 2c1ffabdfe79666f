# Every target works on a fresh checkout: it makes the virtual environment it needs.
# the first Python that runs and is new enough: a pyenv shim may be on the PATH and not run
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# containers set it, and every process of every test would compile this package again
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help serve test check lint format test-clients test-lm-eval test-schema chaos hosts bench bench-gating bench-tiers bench-scale bench-gpu clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# CPU machines get the pinned torch 2.13: a looser range pulls several GB of CUDA libraries.
$(VENV)/.installed: pyproject.toml setup.py
	@echo "setting up $(VENV) (once, a minute or two)"
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q "torch==2.13.*" -e .
	@$(BIN)/python -c "from elastic_moe.model.native import library; library()"
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	@echo "adding the test and lint tools"
	@$(BIN)/pip install -q "torch==2.13.*" -e ".[dev]"
	@touch $@

serve: $(VENV)/.installed ## set up and serve the built-in model on http://127.0.0.1:8000
	@exec $(BIN)/emoe serve --workers 2 $(ARGS)

test: $(VENV)/.installed-dev ## set up and run the tests
	@$(BIN)/python -m pytest -n 2 --no-loadscope-reorder $(ARGS)

test-clients: $(VENV)/.installed-dev ## third-party clients against a real server, each in its own environment
	@$(BIN)/python -m tests.clients.driver $(ARGS)

check: lint ## lint, the pure tests with few examples, and one model family: a minute or two
	@$(BIN)/python -m pytest -n 2 -m "not ray and not slow" --hypothesis-profile=quick -k "not test_parity.py or qwen3_moe" \
		tests/cluster tests/optimizer tests/actors tests/deploy tests/model/test_parity.py

lint: $(VENV)/.installed-dev ## ruff and mypy --strict
	@mkdir -p build/types && ln -sfn "$(CURDIR)" build/types/elastic_moe
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: $(VENV)/.installed-dev ## let ruff rewrite the sources
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

test-lm-eval: $(VENV)/.installed-dev ## compare lm-evaluation-harness over the server with its transformers model
	@$(BIN)/python -m tests.evals.driver $(ARGS)

test-schema: $(VENV)/.installed-dev ## let schemathesis try every call that openapi.json describes
	@$(BIN)/python -m tests.evals.schema $(ARGS)

chaos: $(VENV)/.installed-dev ## kill and stop every process of a server under load, and 20 scale cycles (some 15 minutes)
	@$(BIN)/python -m tests.chaos.driver $(ARGS)

hosts: $(VENV)/.installed-dev ## cut off, slow down and kill the hosts of a cluster under load (as root; some 15 minutes)
	@$(BIN)/python -m pytest -m hosts -rs -s tests/hosts tests/e2e tests/actors/coordinator $(ARGS)

bench: $(VENV)/.installed-dev ## measure the server (and its peers where installed) on this machine
	@$(BIN)/python -m tests.bench.serving $(ARGS)

bench-gating: $(VENV)/.installed-dev ## compare dynamic gating with its rivals' policies on one expert layer
	@$(BIN)/python -m tests.bench.gating $(ARGS)

bench-tiers: $(VENV)/.installed-dev ## half of a model's experts on disk, and llama.cpp under the same memory limit
	@$(BIN)/python -m tests.bench.tiers $(ARGS)

bench-scale: $(VENV)/.installed-dev ## the engine and the coordinator with up to 256 simulated workers and 65,536 sequences
	@$(BIN)/python -m tests.bench.scale $(ARGS)

bench-gpu: $(VENV)/.installed-dev ## compare with transformers' continuous batching on a CUDA GPU
	@$(BIN)/python -m tests.bench.gpu $(ARGS)

clean: ## remove the virtual environment and caches
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -rf $(VENV) build/types .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
