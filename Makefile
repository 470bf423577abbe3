# `make demo` and `make test` set up an environment of their own in .venv; an installed torch that fits is reused.
#   make test PYTHON=python3.12                    another interpreter
#   make demo PIP_ARGS="-c constraints.txt --pre"  other arguments for pip (the default is `-c constraints.txt`)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1
export HF_UPDATE_DOWNLOAD_COUNTS ?= 0

TORCH_FITS := from importlib.metadata import version; assert tuple(map(int, version('torch').split('.')[:2])) >= (2, 9)

# Files of the repository that have a public schema.
SCHEMA = $(BIN)/check-jsonschema --quiet --builtin-schema

.PHONY: demo test test-first test-slow coverage check format types generated hooks mutants bench

demo: $(VENV)/.installed
	$(BIN)/hf-rb demo --output runs/demo --overwrite

# Two processes with one thread each. A file stays in one of them, for what its tests share; files keep their order (tests/conftest.py).
TWO_AT_A_TIME := -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(TWO_AT_A_TIME) $(PYTEST_ARGS)

test-slow: $(VENV)/.installed
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest -m "slow or hypothesis" $(PYTEST_ARGS)

# Lines of the package that the fast tests run, without those that only processes of their own do.
coverage: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(TWO_AT_A_TIME) --cov=hf_rb --cov-report=term:skip-covered $(PYTEST_ARGS)

# Tests that import no torch: seconds, so they run before every commit.
test-first: $(VENV)/.installed
	$(BIN)/python -m pytest -q -m "torch_free and not slow" $(PYTEST_ARGS)

check: $(VENV)/.installed-dev types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(SCHEMA) vendor.github-workflows .github/workflows/*.yml
	$(SCHEMA) vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/method.yml
	$(SCHEMA) vendor.citation-file-format --force-filetype yaml CITATION.cff
	$(BIN)/hf-rb check $(filter-out recipes/accelerate_configs/%,$(wildcard recipes/*/*.yaml))

types: $(VENV)/.installed-dev
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Small changes that some test should notice; hours for all modules: MUTANTS_ARGS="objectives/akl --count 20".
mutants: $(VENV)/.installed
	$(BIN)/python tests/mutants.py $(MUTANTS_ARGS)

# The pages of docs/ that follow from the records of methods.
generated: $(VENV)/.installed
	$(BIN)/python -m hf_rb.methods.tables docs/methods.md

hooks: $(VENV)/.installed-dev
	$(BIN)/pre-commit install

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

# A torch that fits is taken over from the interpreter; an environment that is there already is used as it is.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || { $(PYTHON) -m venv --system-site-packages $(VENV); \
		$(BIN)/python -c "$(TORCH_FITS)" 2>/dev/null || $(PYTHON) -m venv --clear $(VENV); }
	@if $(BIN)/python -c "$(TORCH_FITS)" 2>/dev/null; then \
		echo "Using the torch that is installed"; grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt; \
	else cp constraints.txt $(VENV)/constraints.txt; fi
	$(BIN)/python -m pip install $(or $(PIP_ARGS),-c $(VENV)/constraints.txt) -e '.[test]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install $(or $(PIP_ARGS),-c $(VENV)/constraints.txt) -e '.[dev]'
	@touch $@
