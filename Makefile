.DEFAULT_GOAL := help
.PHONY: help run test test-all check bench bench-compare lock clean
PYTHON ?= python3
PORT ?= 8000
BIN := .venv/bin
BESIDE := -n auto --dist worksteal
ORDER ?= # of the tests; `-p randomly --randomly-seed=1` shuffles them

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: .venv/run ## the sidecar on 127.0.0.1:8000 (PORT=… moves it); answers offline where no credentials are set
	@exec $(BIN)/session-sidecar serve --model auto --port $(PORT)

test: .venv/dev ## the tests for each change, offline, a worker a core: all units, and smoke tests of what runs agents
	$(BIN)/pytest $(BESIDE) -m "not long and not quiet" $(ORDER)

test-all: .venv/dev ## every test; CI runs this
	$(BIN)/pytest $(BESIDE) -m "not quiet" $(ORDER)
	$(BIN)/pytest -m quiet $(ORDER)

check: .venv/dev ## ruff, the type checker, the floors of the house, and known holes in what is installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest tests/test_house.py -k "import or floor or stranger"
	$(BIN)/pip-audit --progress-spinner off --desc off --disable-pip --require-hashes -r requirements.lock

bench: .venv/bench ## measure it against what else there is, in about forty minutes; writes bench/results.*
	$(BIN)/python -m bench

bench-compare: .venv/bench ## what got slower or faster than in the last version that bench/results/ has
	@$(BIN)/python -m bench.compare

lock: .venv/dev ## write the lock files anew from pyproject.toml
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	    --no-emit-index-url --no-emit-find-links pyproject.toml --group build -o requirements.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	    --no-emit-index-url --no-emit-find-links pyproject.toml --extra postgres --group build -c requirements.lock \
	    -o requirements-postgres.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	    --no-emit-index-url --no-emit-find-links --group dev -c requirements.lock -o requirements-dev.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	    --no-emit-index-url --no-emit-find-links pyproject.toml --group bench -c requirements.lock -o requirements-bench.lock

clean: ## remove the virtual environment (never ./var, which holds the conversations)
	rm -rf .venv

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "session-sidecar needs Python 3.11 or newer; name one with PYTHON=…")'
	@echo "setting up: the virtual environment .venv"
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/run: .venv/python requirements.lock pyproject.toml
	@echo "setting up: the packages of requirements.lock; the SDK brings the CLI, some 170 MB"
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@echo "setting up: session-sidecar itself"
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

.venv/dev: .venv/run requirements-dev.lock
	@echo "setting up: what the tests need, from requirements-dev.lock"
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@touch $@

.venv/bench: .venv/run requirements-bench.lock
	@echo "setting up: what the bench compares with, from requirements-bench.lock"
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements-bench.lock
	@touch $@
