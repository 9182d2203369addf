# `make quickstart` compresses a model of half a million parameters; `make test` runs the tests, `make test-slow` the longest ones.
PYTHON ?= python3
BIN := .venv/bin
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax

.PHONY: setup dev quickstart test test-slow lint clean

setup: .venv/.installed

.venv/.installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

dev: .venv/.dev

.venv/.dev: .venv/.installed setup.cfg
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

quickstart: setup
	$(BIN)/python -m experiments.compress --config=digits --workdir=runs/quickstart

test: dev
	$(BIN)/python -m pytest -n 2

test-slow: dev
	$(BIN)/python -m pytest -n 2 -m slow

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .cache runs build *.egg-info
