# make repro   set up, then run the current study          make test   set up, then the tests
PYTHON ?= python3
VENV := .venv
# Once `make gpu` has been called, the other commands keep to it.
LOCK := $(if $(wildcard $(VENV)/.ready-requirements-gpu.lock),requirements-gpu.lock,requirements.lock)
UV := $(shell sed -n 's/^\(uv==[0-9.]*\).*/\1/p' $(LOCK))
# The stages run `python`: the environment's own comes first.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export DVC_NO_ANALYTICS := 1

.PHONY: repro setup gpu test test-slow benchmarks lint lock audit

repro: setup
	@$(VENV)/bin/python -m ablation_lab.dvc_command
	$(VENV)/bin/dvc repro
	@echo "Report: reports/report.html"

# A stamp a lock file: going from the CPU's to the GPU's and back sets up again.
setup: $(VENV)/.ready-$(LOCK)

gpu:
	$(MAKE) setup LOCK=requirements-gpu.lock

# Bytecode is compiled once here: importing TensorFlow takes three times as long without.
$(VENV)/.ready-$(LOCK): $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "Expected Python 3.11 to 3.13. Found: %d.%d. Name another one with make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check "$(UV)"
	VIRTUAL_ENV=$(VENV) $(VENV)/bin/uv pip sync --quiet --require-hashes --compile-bytecode $(LOCK)
	VIRTUAL_ENV=$(VENV) $(VENV)/bin/uv pip install --quiet --no-deps --no-build-isolation --editable .
	@rm -f $(VENV)/.ready-*
	@touch $@

test: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: setup
	$(VENV)/bin/pytest -m slow

# What docs/benchmarks.md says; `make benchmarks ONLY="quickstart loop"` renews a part of it.
benchmarks: setup
	$(VENV)/bin/python benchmarks/run.py $(ONLY)

lint: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/mypy

lock: setup
	$(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --extra dev -o requirements.lock pyproject.toml
	$(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --extra dev --extra gpu -c requirements.lock -o requirements-gpu.lock pyproject.toml

# Known vulnerabilities of what is locked; those that are accepted stand in pyproject.toml.
audit: setup
	@$(VENV)/bin/python .ci/audit.py
