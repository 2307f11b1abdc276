# Needs make and Python 3.11 or newer (PYTHON=python3.12 chooses one). Everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FLOORS := models runtime exporter dashboard
CHECKPOINTS := models/checkpoints
export STAGELINE_CHECKPOINTS := $(CURDIR)/$(CHECKPOINTS)
ALONE = $(shell grep -rlE '^(pytestmark = |@)pytest\.mark\.alone' tests)
BRIEF := --seconds 1.5 --repeats 5 --warm-up 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test check lint types reference pytest docs docs-reference view checkpoints bench clean

help:
	@echo 'make demo            fetch two real models, export each to two stages, run and measure them'
	@echo 'make test            lint, types and all tests that need no GPU'
	@echo 'make docs            the documentation as a site with search, into site/; fails on broken links'
	@echo 'make docs-reference  write the generated pages again, after a command or an option changed'
	@echo 'make bench           the benchmarks, into benchmarks/results/'
	@echo 'make clean           remove the environment, bundles, site and caches (checkpoints stay)'

# The stamp is newer than pyproject.toml when the environment fits it.
$(VENV)/stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; choose one with: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[cpu,openvino,rtx,export,serve,dashboard,debug,docs,dev]'
	@touch $@

checkpoints: $(VENV)/stamp
	@$(BIN)/stageline models fetch minilm
	@$(BIN)/stageline models fetch smollm2

demo: checkpoints
	@rm -rf bundles/minilm bundles/smollm2
	@mkdir -p bundles
	$(BIN)/stageline export $(CHECKPOINTS)/minilm -o bundles/minilm --stages 2
	$(BIN)/stageline export $(CHECKPOINTS)/smollm2 -o bundles/smollm2 --stages 2
	$(BIN)/stageline run bundles/minilm --text 'A cat sits on the mat.' --text 'A kitten rests on a rug.' --text 'Shares fell sharply on Monday.'
	$(BIN)/stageline run bundles/smollm2 --text 'The capital of France is'
	$(BIN)/stageline bench bundles/minilm $(BRIEF) --concurrency 1,4 --baseline onnxruntime
	$(BIN)/stageline bench bundles/smollm2 $(BRIEF) --concurrency 1,4 --new-tokens 16
	@echo
	@echo 'Both runs are stored. To see them, and the stages, plans and timelines, open the dashboard:'
	@echo
	@echo '    $(BIN)/stageline dashboard'
	@echo

test: lint
	@$(MAKE) --no-print-directory -j 2 types reference
	@$(MAKE) --no-print-directory pytest STAGELINE_REFERENCE=$(CURDIR)/.cache/reference

check: lint types

lint: $(VENV)/stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy and the documentation do not follow setuptools' package-dir; these links give the packages their full names.
view:
	@mkdir -p .view/stageline
	@for floor in $(FLOORS); do ln -sfn ../../$$floor .view/stageline/$$floor; done

types: $(VENV)/stamp view
	$(BIN)/mypy -p stageline.models -p stageline.runtime -p stageline.exporter -p stageline.dashboard
	$(BIN)/mypy benchmarks examples docs/generate.py docs/pictures.py

# The reference checkpoints' bundles, for the tests: made while mypy, which is one thread, has the other core.
reference: checkpoints
	@rm -rf .cache/reference
	@for name in minilm smollm2; do $(BIN)/stageline export $(CHECKPOINTS)/$$name -o .cache/reference/$$name || exit 1; done

# A file's tests run in one process: what they share is made once. (pytest 9.2 loses the groups of pytest-xdist 3.8.)
# Files run in the order that tests/conftest.py gives them, the longest first.
# Times against theory get three goes, for the machine may be shared: what our figures get wrong is wrong every time.
pytest: checkpoints
	@rm -rf .cache/parity
	STAGELINE_PARITY=$(CURDIR)/.cache/parity $(BIN)/pytest -m 'not gpu and not alone and not reality' -n 2 --dist loadfile --no-loadscope-reorder
	STAGELINE_PARITY=$(CURDIR)/.cache/parity $(BIN)/pytest tests/reality -n 2 --dist worksteal
	$(BIN)/pytest -m alone $(ALONE) || $(BIN)/pytest -m alone --last-failed $(ALONE) || $(BIN)/pytest -m alone --last-failed $(ALONE)

docs: $(VENV)/stamp view
	$(BIN)/python docs/generate.py --check
	$(BIN)/zensical build --clean --strict

docs-reference: $(VENV)/stamp
	$(BIN)/python docs/generate.py

bench: checkpoints
	@mkdir -p benchmarks/results
	$(BIN)/python benchmarks/export_cost.py --json benchmarks/results/export_cost.json
	$(BIN)/python benchmarks/pipeline.py --json benchmarks/results/pipeline.json
	$(BIN)/python benchmarks/hop.py --json benchmarks/results/hop.json
	$(BIN)/python benchmarks/dashboard.py --json benchmarks/results/dashboard.json

clean:
	rm -rf $(VENV) .view .cache site bundles build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
