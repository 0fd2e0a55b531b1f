# `make train` and `make test` do everything they need on a machine with Python 3.10+, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
# Exact, and named in every install: `2.13.0` accepts a CPU build (2.13.0+cpu) where the user's pip finds one and prefers it,
# while a range would let a later release from the index replace it, gigabytes of GPU libraries included.
TORCH := torch==2.13.0
# Overrides for the command: make train ARGS="model=nano trainer.max_steps=200"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup train test lint notebooks docs pair bench faults clean

help:
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-17s %s\n", $$1, $$2 }'

setup: $(STAMP) ## make .venv and install meshformer into it, editable

train: $(STAMP) ## train the default recipe; ARGS="key=value ..." overrides
	$(BIN)/meshformer train $(ARGS)

test: $(STAMP) ## lint, type check, run the notebooks, build the documentation and run the whole suite; ARGS="..." goes to pytest
	@$(MAKE) --no-print-directory -j2 --output-sync=target lint notebooks docs
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(STAMP) ## ruff and basedpyright
	$(BIN)/ruff check src tests docs
	$(BIN)/basedpyright

notebooks: $(STAMP) ## run every notebook in notebooks/, each from start to end
	@mkdir -p runs/notebooks
	$(BIN)/python -m meshformer.bench.examples
	@set -e; for source in notebooks/*.py; do \
		$(BIN)/jupytext --quiet --to ipynb --output "runs/notebooks/$$(basename "$$source" .py).ipynb" "$$source"; \
	done
	$(BIN)/python -m pytest -q --nbmake runs/notebooks

docs: $(STAMP) ## build the site of docs/ into build/site; every warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file docs/site/mkdocs.yml

pair: $(STAMP) ## write the edits of notebooks/*.py into the .ipynb beside them, or the other way round: the newer wins
	$(BIN)/jupytext --quiet --sync notebooks/*.py

bench: $(STAMP) ## speed as ratios: our Trainer against a bare loop, bf16 against fp32
	$(BIN)/python -m meshformer.bench $(ARGS)

faults: $(STAMP) ## kill, starve and damage 200 runs and see that none is lost; goes on where it was
	$(BIN)/python -m meshformer.bench.faults $(ARGS)

clean: ## remove .venv, caches and builds; runs/ and data stay
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("meshformer needs Python 3.10 or newer; set PYTHON=..." if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet '$(TORCH)'
	$(PIP) install --quiet '$(TORCH)' -e '.[dev]'
	@touch $@
