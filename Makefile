# `make serve` and `make test` need nothing but Python >= 3.11 and make; everything else is set up in .venv.
PYTHON ?= python3
VENV := .venv
CLIENTS := .venv-clients
LOCKER := .venv-lock
AUDITOR := .venv-audit
FUZZER := .venv-fuzz
BIN := $(VENV)/bin
MODEL ?= demo-llama
PORT ?= 8000
REPLICAS ?= 2
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help serve serve-ray test check format lint types floors lock audit sbom planted fuzz-api clients loadtest bench gpu-check clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

serve: $(VENV)/.ready ## start the server on the demo base with the shipped adapters (MODEL=, PORT=, ARGS=)
	$(BIN)/peft-serve serve $(MODEL) --port $(PORT) $(ARGS)

serve-ray: $(VENV)/.ready ## the same from many replicas, on Ray Serve (REPLICAS=2, MODEL=, PORT=, ARGS=)
	$(BIN)/peft-serve serve-ray $(MODEL) --replicas $(REPLICAS) --port $(PORT) $(ARGS)

# Many tests start commands and servers: they read the bytecode that the first one wrote.
test: $(VENV)/.interpreter ## run every test
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE= \
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

# A GPU machine may have no network and a Python of its own with torch in it: nothing is set up here.
gpu-check: ## check this GPU, correctness and then speed, in under ten minutes (ARGS=, see docs/how-to/gpu.md)
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m loadtest gpu-check $(ARGS)

lock: $(VENV)/.ready $(LOCKER)/.ready ## write requirements.lock and requirements.hashes from what is installed
	$(BIN)/pip freeze --all --exclude-editable | sed 's/+cpu$$//' | grep -viE '^(peft-serve|pip|wheel|triton)==|^-e' > requirements.lock
	grep -v '^torch==' requirements.lock | $(LOCKER)/bin/uv pip compile - --quiet --no-deps --generate-hashes \
	    --no-header --no-annotate --output-file requirements.hashes

# --strict: a package that nobody could tell of is no pass.
audit: $(AUDITOR)/.ready ## ask PyPI for known vulnerabilities of what requirements.lock names (needs pypi.org)
	$(AUDITOR)/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r requirements.lock

sbom: $(VENV)/.ready $(AUDITOR)/.ready ## write dist/sbom.json, what is installed and under which licences (CycloneDX)
	@mkdir -p dist
	$(AUDITOR)/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible \
	    --output-format JSON --output-file dist/sbom.json

planted: $(VENV)/.ready ## plant faults in a copy of the tree and see that each turns a test red (ARGS= picks by words)
	$(BIN)/python -m tests.planted run $(ARGS)

fuzz-api: $(VENV)/.ready $(FUZZER)/.ready ## schemathesis over every route of a server over fakes (ARGS=--seconds 600)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.attacks.fuzz_api $(abspath $(FUZZER))/bin/st $(ARGS)

clean: ## remove the virtual environment and every cache
	rm -rf $(VENV) $(CLIENTS) $(LOCKER) $(AUDITOR) $(FUZZER) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist

# Everything is held to its hash but torch, whose builds for CPUs and GPUs differ: pip picks this machine's.
$(VENV)/.ready: requirements.lock requirements.hashes pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "peft-serve needs Python 3.11 or newer; set PYTHON=")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --require-hashes -r requirements.hashes
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -e .
	@touch $@

# The tests alone need it: GPU kernels run in Triton's interpreter there.
$(VENV)/.interpreter: $(VENV)/.ready requirements.interpreter
	$(BIN)/python -c 'import triton' 2>/dev/null || \
	    $(BIN)/python -m pip install --disable-pip-version-check --no-deps --require-hashes -r requirements.interpreter
	@touch $@

$(LOCKER)/.ready:
	@test -x $(LOCKER)/bin/python || $(PYTHON) -m venv $(LOCKER)
	$(LOCKER)/bin/python -m pip install --disable-pip-version-check uv==0.13.9
	@touch $@

$(AUDITOR)/.ready:
	@test -x $(AUDITOR)/bin/python || $(PYTHON) -m venv $(AUDITOR)
	$(AUDITOR)/bin/python -m pip install --disable-pip-version-check pip-audit==2.10.1 cyclonedx-bom==7.5.0
	@touch $@

$(FUZZER)/.ready:
	@test -x $(FUZZER)/bin/python || $(PYTHON) -m venv $(FUZZER)
	$(FUZZER)/bin/python -m pip install --disable-pip-version-check schemathesis==4.32.5
	@touch $@

$(CLIENTS)/.ready: tests/clients/requirements.txt
	@test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --disable-pip-version-check -r tests/clients/requirements.txt
	@touch $@
