# `make serve` and `make test` need nothing but Python >= 3.11 and make; everything else is set up in .venv.
PYTHON ?= python3
VENV := .venv
CLIENTS := .venv-clients
LOCKER := .venv-lock
BIN := $(VENV)/bin
MODEL ?= demo-llama
PORT ?= 8000
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help serve test check format lint types floors lock clients loadtest bench clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

serve: $(VENV)/.ready ## start the server on the demo base with the shipped adapters (MODEL=, PORT=, ARGS=)
	$(BIN)/peft-serve serve $(MODEL) --port $(PORT) $(ARGS)

test: $(VENV)/.ready ## run every test
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
	    $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

check: format lint types floors ## format, lint, types and import floors, as CI runs them

format: $(VENV)/.ready
	$(BIN)/ruff format --check .

lint: $(VENV)/.ready
	$(BIN)/ruff check .

types: $(VENV)/.ready
	$(BIN)/mypy

floors: $(VENV)/.ready
	$(BIN)/lint-imports

clients: $(VENV)/.ready $(CLIENTS)/.ready ## drive the server by the clients that people have, in an environment of their own
	SERVER_BIN=$(abspath $(BIN)) $(CLIENTS)/bin/python -m pytest tests/clients
	$(BIN)/python -m pytest tests/clients

loadtest: $(VENV)/.ready ## a short load test of the demo server (ARGS= picks another, see loadtest/README.md)
	$(BIN)/python -m loadtest $(if $(ARGS),$(ARGS),w4 --quick)

bench: $(VENV)/.ready ## the short load test of this machine, under ten minutes on two cores, with a page about it (ARGS=)
	$(BIN)/python -m loadtest bench $(ARGS)

lock: $(VENV)/.ready $(LOCKER)/.ready ## write requirements.lock and requirements.hashes from what is installed
	$(BIN)/pip freeze --all --exclude-editable | sed 's/+cpu$$//' | grep -viE '^(peft-serve|pip|wheel)==|^-e' > requirements.lock
	grep -v '^torch==' requirements.lock | $(LOCKER)/bin/uv pip compile - --quiet --no-deps --generate-hashes \
	    --no-header --no-annotate --output-file requirements.hashes

clean: ## remove the virtual environment and every cache
	rm -rf $(VENV) $(CLIENTS) $(LOCKER) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist

# Everything is held to its hash but torch, whose builds for CPUs and GPUs differ: pip picks this machine's.
$(VENV)/.ready: requirements.lock requirements.hashes pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "peft-serve needs Python 3.11 or newer; set PYTHON=")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --require-hashes -r requirements.hashes
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -e .
	@touch $@

$(LOCKER)/.ready:
	@test -x $(LOCKER)/bin/python || $(PYTHON) -m venv $(LOCKER)
	$(LOCKER)/bin/python -m pip install --disable-pip-version-check uv==0.13.9
	@touch $@

$(CLIENTS)/.ready: tests/clients/requirements.txt
	@test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --disable-pip-version-check -r tests/clients/requirements.txt
	@touch $@
