# `make quickstart` and `make test` are each enough on a fresh machine with Python 3.10 or newer.
PYTHON ?= python3
VENV ?= .venv
# Two processes of one thread each: tests are small, and threads that wait for a busy core are slow.
WORKERS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: quickstart test lint clean

quickstart: $(VENV)/.ready
	$(BIN)/ratoon quickstart

test: $(VENV)/.ready-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch goes first and alone: a looser request, by a package that comes before it, would bring another build.
$(VENV)/.ready: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' requirements.txt)"
	$(PIP) -r requirements.txt
	$(PIP) --no-deps --editable .
	touch $@

$(VENV)/.ready-test: $(VENV)/.ready requirements-test.txt
	$(PIP) -r requirements-test.txt
	touch $@

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
