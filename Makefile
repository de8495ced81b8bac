# Three commands, each on a bare machine with python3 >= 3.11.

PYTHON ?= python3
BIN := .venv/bin

# Huge pages for large arrays: about a fifth faster on Linux, unused elsewhere.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: quickstart test lint

.venv/.installed: setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

.venv/.tested: .venv/.installed
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $@

quickstart: .venv/.installed
	$(BIN)/dsv3 train --config=experiments/quickstart.py --workdir=runs/quickstart
	$(BIN)/dsv3 eval --checkpoint=runs/quickstart
	$(BIN)/dsv3 generate --checkpoint=runs/quickstart --prompt='import ' --prompt='def '

test: .venv/.tested
	$(BIN)/pytest -n 2 --dist worksteal -q

lint: .venv/.tested
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
