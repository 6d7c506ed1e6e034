# make serve   start the server (the first time: .venv, packages, default weights)
# make test    run the tests, two files at a time
# make test-all   the same, then those that take long and rarely break
# make lint    ruff, mypy
# make clean   remove .venv and every cache of this folder
# PYTHON=...   the interpreter to make .venv with (3.11 or newer)
# ARGS=...     more flags for the server: make serve ARGS=--config.server.port=8001

NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for p in python3.11 python3; do $$p $(NEW_ENOUGH) 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

PYTEST := $(BIN)/python -m pytest -q -n 2 --dist=loadfile

.PHONY: serve test test-all lint clean

serve: .venv/.stamp
	$(BIN)/python launch/serve.py --config=multi.py $(ARGS)

test: .venv/.stamp-test
	$(PYTEST) -m 'not full'

test-all: test
	$(PYTEST) -m full

lint: .venv/.stamp-test
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.stamp: requirements.txt
.venv/.stamp-test: requirements-test.txt requirements.txt

# -qq: pip says nothing but errors.
.venv/.stamp .venv/.stamp-test: | .venv/bin/python
	$(BIN)/python -m pip install -qq --disable-pip-version-check -r $<
	touch $@

.venv/bin/python:
	@$(or $(PYTHON),false) $(NEW_ENOUGH) || { echo 'Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	$(PYTHON) -m venv .venv
