# Everything a developer or CI runs. Variables: PYTHON (the interpreter a new venv is made with), VENV.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Without this the working folder hides Hugging Face's `kernels` package behind ours (docs/decisions/001).
export PYTHONSAFEPATH := 1
export HF_HUB_OFFLINE := 1

.PHONY: demo test test-all check bench install clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml .ci/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c .ci/constraints.txt torch
	$(BIN)/python -m pip install -q -c .ci/constraints.txt -e '.[demo,dev]'
	touch $@

demo: install
	$(BIN)/python docs/examples/demo.py

test: install
	$(BIN)/pytest -m "not slow and not interop_py and not gpu"

test-all: install
	$(BIN)/pytest -m "not gpu"

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	BIN=$(BIN) .ci/types
	$(BIN)/lint-imports
	$(BIN)/mkdocs build -q --strict -f docs/mkdocs.yml

bench: install
	$(BIN)/python tests/bench/run.py

clean:
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache
