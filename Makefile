# `make train` and `make test` do everything they need on a machine with Python 3.10+, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
# Exact, and named in every install: `2.13.0` accepts a CPU build (2.13.0+cpu) where the user's pip finds one and prefers it,
# while a range would let a later release from the index replace it, gigabytes of GPU libraries included.
TORCH := torch==2.13.0
# Bytecode is kept, whatever the shell says: without it each process compiles again all that it imports. For `import meshformer.job.train` that is
# 18 instead of 10 s of CPU time (two cores of an Intel Xeon, 2026-11-30).
export PYTHONDONTWRITEBYTECODE :=
# Overrides for the command: make train ARGS="model=nano trainer.max_steps=200"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup train test lint notebooks docs pair bench faults tensorflow litert clean

help:
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-17s %s\n", $$1, $$2 }'

setup: $(STAMP) ## make .venv and install meshformer into it, editable

train: $(STAMP) ## train the default recipe; ARGS="key=value ..." overrides
	$(BIN)/meshformer train $(ARGS)

test: $(STAMP) ## lint, type check, run the notebooks, build the documentation and run the whole suite; ARGS="..." goes to pytest
	@$(MAKE) --no-print-directory -j2 --output-sync=target lint notebooks docs
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

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

tensorflow: .venv-tensorflow/.installed ## records read and written by us and by TensorFlow, in an environment of its own
	PYTHONPATH=src TF_ENABLE_ONEDNN_OPTS=0 .venv-tensorflow/bin/python tests/data/tensorflow/check.py

litert: $(STAMP) .venv-litert/.installed ## make the environment of `meshformer export format=litert`, and compare what it writes with the models
	PYTHONPATH=src:tests $(BIN)/python -m meshformer.bench litert $(ARGS)

clean: ## remove the environments, caches and builds; runs/ and data stay
	rm -rf $(VENV) .venv-tensorflow .venv-litert dist build .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("meshformer needs Python 3.10 or newer; set PYTHON=..." if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	@# --no-compile: Python compiles the files that it imports when it first does, which are a small part of these packages.
	$(PIP) install --quiet --no-compile '$(TORCH)'
	$(PIP) install --quiet --no-compile '$(TORCH)' -e '.[dev]'
	@$(BIN)/python -c 'import meshformer.job.train' # the first import, now and not in the first run
	@touch $@

# They pin other versions of packages that the project has, so each has an environment of its own.
.venv-tensorflow/.installed:
	$(PYTHON) -m venv .venv-tensorflow
	.venv-tensorflow/bin/python -m pip --disable-pip-version-check install --quiet 'tensorflow-cpu>=2.21' google-crc32c filelock
	@touch $@

# The same torch, which reads the graph that the project's wrote.
.venv-litert/.installed:
	$(PYTHON) -m venv .venv-litert
	.venv-litert/bin/python -m pip --disable-pip-version-check install --quiet '$(TORCH)'
	.venv-litert/bin/python -m pip --disable-pip-version-check install --quiet '$(TORCH)' 'litert-torch>=0.10,<0.11' 'ai-edge-litert>=2.3' tokenizers
	@touch $@
