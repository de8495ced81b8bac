.PHONY: test lint
PY := .venv/bin/python

.venv/.test: setup.cfg constraints.txt
	test -x $(PY) || python3 -m venv .venv
	.venv/bin/pip install -q -c constraints.txt -e '.[test]'
	touch $@

test: .venv/.test
	.venv/bin/pytest -n 2 -q

lint: .venv/.test
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
