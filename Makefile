# Everything a developer or CI runs. Variables: PYTHON (the interpreter a new venv is made with), VENV.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Without this the working folder hides Hugging Face's `kernels` package behind ours (docs/decisions/001).
export PYTHONSAFEPATH := 1
# Nothing here may depend on the Hub: the demo's weights come from the package index.
export HF_HUB_OFFLINE := 1

.PHONY: help install demo test test-all churn check format bench sim clean

help:
	@echo "make demo      split Gemma 3 270M over three processes and kill one (installs first)"
	@echo "make test      the tests; test-all adds the slow ones"
	@echo "make churn     the DHT loses a third of 100 nodes a minute, 20 times over: a quarter of an hour of one core"
	@echo "make check     formatting, lint, types, import rules, docs"
	@echo "make format    reformat and fix what can be fixed"
	@echo "make bench     measure this machine"
	@echo "make sim       simulate the DHT with up to 10,000 nodes (hours; SIM=--quick: minutes)"

install: $(VENV)/.installed

# torch first and pinned: whatever else wants a torch then finds this one in place.
$(VENV)/.installed: setup.cfg pyproject.toml .ci/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c .ci/constraints.txt torch
	$(BIN)/python -m pip install -q -c .ci/constraints.txt -e '.[demo,dev]'
	touch $@

demo: install
	$(BIN)/python docs/examples/demo.py

test: install
	$(BIN)/pytest -m "not slow and not gpu"

test-all: install
	$(BIN)/pytest -m "not gpu"

churn: install
	seq 0 19 | xargs -P $$(nproc) -I SEED $(BIN)/pytest -p no:cacheprovider \
	  "tests/sim/test_sim_churn.py::test_a_hundred_nodes_for_ten_minutes[SEED]"

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	BIN=$(BIN) .ci/types
	$(BIN)/lint-imports
	$(BIN)/mkdocs build -q --strict -f docs/mkdocs.yml

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

sim: install
	PYTHONPATH=tests $(BIN)/python -m sim.report $(SIM)

bench: install
	set -e; for name in planner engine memory transport hostile link chain decode; do \
	  echo "== tests/bench/$$name.py"; $(BIN)/python tests/bench/$$name.py; \
	done

clean:
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
