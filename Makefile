# The commands of the project. Each one creates .venv first, if it is not there or out of date.

PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help demo test lint format bench clean
.DEFAULT_GOAL := help

help: ## Print this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1|\2/p' Makefile | awk -F'|' '{ printf "%-12s %s\n", $$1, $$2 }'

demo: $(STAMP) ## Train a small language model with and without protection (options: ARGS="--steps 200")
	$(BIN)/stablekit demo $(ARGS)

test: lint ## Run everything that CI runs (options for pytest: ARGS="-k zclip")
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(STAMP) ## Check style, types and import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## Format the code and apply the fixes that ruff can make
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(STAMP) ## Print the table of benchmarks
	$(BIN)/python -m benchmarks $(ARGS)

clean: ## Remove .venv, builds, caches and the output of the demo
	rm -rf .venv build dist runs .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
