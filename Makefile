# Two commands do everything: `make reproduce` and `make test`. Both create the environment if need be.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Extra options for pip, as an index with PyTorch's CPU build: make reproduce PIP_ARGS="--extra-index-url ..."
PIP_ARGS ?=
# Options for the experiment: make reproduce ARGS="--seeds 10"
ARGS ?=

export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help install reproduce test test-quick lint docs wheel release-check audit benchmark clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: $(VENV)/.installed  ## Create .venv with everything in it

# The stamp comes last: an interrupted installation is done again.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Python 3.11 or newer is needed, $(PYTHON) is {v[0]}.{v[1]}; choose one with make PYTHON=...")'
	@echo "Creating $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -c constraints.txt $(PIP_ARGS) -e '.[dev]'
	@touch $@

reproduce: install  ## Run the paper's experiment in small (about 6 minutes on 2 cores)
	$(BIN)/crisp reproduce $(ARGS)

test: install  ## Run all tests (9 to 13 minutes on 2 idle cores)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-quick: install  ## Run the tests that neither train, compile nor start processes (a few minutes)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

lint: install  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install  ## Build the documentation into build/site; every link is checked
	NO_MKDOCS_2_WARNING=1 HF_HUB_OFFLINE=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

wheel: install  ## Build the source archive and the wheel into dist/
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist

release-check: wheel  ## Check the wheel's contents, and try it in empty environments (minutes; ARGS="--all": every extra)
	$(BIN)/python -m pytest tests/test_wheel.py
	$(BIN)/python tests/clean_install.py dist/*.whl $(ARGS) -- $(PIP_ARGS)

audit: install  ## Look for known weaknesses of what is pinned (needs the internet)
	$(BIN)/python -m pip install --quiet -c constraints.txt 'pip-audit>=2.7'
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

benchmark: install  ## Measure the speed of fine-tuning on this machine (a few minutes)
	$(BIN)/python benchmarks/finetuning_throughput.py $(ARGS)

clean:  ## Remove the environment and caches; runs/ stays
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
