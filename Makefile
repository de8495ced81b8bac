# Each on a bare machine with python3 >= 3.11; test312 wants python3.12.

PYTHON ?= python3
PYTHON312 ?= python3.12
BIN := .venv/bin

# Huge pages for large arrays: faster on Linux, unused elsewhere.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: quickstart test test312 nightly lint browser

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

# The newer JAX that GPU users have: its interpreter runs Hopper kernels on a CPU.
.venv312/.tested: constraints312.txt
	test -x .venv312/bin/python || $(PYTHON312) -m venv .venv312
	.venv312/bin/pip install -q -c constraints312.txt jax flax optax \
	  ml_collections jaxtyping beartype hypothesis pytest pytest-timeout pytest-xdist
	touch $@

# What is long and of a claim that `make test` checks more briefly.
nightly: .venv/.tested .venv312/.tested
	$(BIN)/pytest -n 2 --dist worksteal -q -m nightly --durations=20
	.venv312/bin/python -m pytest -n 2 --dist worksteal -q -m nightly \
	  --durations=20 $(TESTS312)

# TPU kernels, and the FP8 model, whose products are simulated on a CPU, are
# tested with the other JAX.
TESTS312 := --ignore-glob='*_tpu.py' tests/pallas tests/ops/test_fp8_linear.py \
  tests/ops/test_all_to_all.py tests/nn/test_model_oracle.py
test312: .venv312/.tested
	.venv312/bin/python -m pytest -n 2 --dist worksteal -q $(TESTS312)

lint: .venv/.tested
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# For the tests of the server's page, which skip where there is none. Installs
# only where it may (Debian, as root), and goes on if it cannot.
browser:
	@command -v chromium || if test "$$(id -u)" = 0 && command -v apt-get; then \
	  export DEBIAN_FRONTEND=noninteractive; apt-get update -qq; \
	  apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core \
	    || echo 'no chromium: tests of the page will skip'; \
	fi
