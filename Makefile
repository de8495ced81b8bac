# Each on a bare machine with python3 >= 3.11; test312 and
# compiled want python3.12.

PYTHON ?= python3
PYTHON312 ?= python3.12
BIN := .venv/bin
PACKAGES312 := flax optax ml_collections jaxtyping beartype hypothesis pytest \
  pytest-timeout pytest-xdist

# Huge pages for large arrays: faster on Linux, unused elsewhere.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: quickstart test test312 nightly compiled lint browser

.venv/.installed: setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

.venv/.tested: .venv/.installed
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $@

# Others' clients of the server, for `make nightly`.
.venv/.clients: .venv/.tested
	$(BIN)/pip install -q -c constraints.txt -e '.[test,clients]'
	touch $@

quickstart: .venv/.installed
	$(BIN)/dsv3 train --config=experiments/quickstart.py --workdir=runs/quickstart
	$(BIN)/dsv3 eval --checkpoint=runs/quickstart
	$(BIN)/dsv3 generate --checkpoint=runs/quickstart --prompt='import ' --prompt='def '

PYTEST := -m pytest -n 2 --dist worksteal -q

# Hopper kernels are tested with the newer JAX, whose interpreter runs them.
test: .venv/.tested
	$(BIN)/python $(PYTEST) --ignore-glob='*_gpu.py'

# The newer JAX that GPU users have: its interpreter runs Hopper kernels on a CPU.
.venv312/.tested: constraints312.txt
	test -x .venv312/bin/python || $(PYTHON312) -m venv .venv312
	.venv312/bin/pip install -q -c constraints312.txt jax $(PACKAGES312)
	touch $@

# With the newer JAX: Hopper kernels, and that the model, its gradients, FP8 and
# the exchange of experts work there.
GPU := tests/pallas/*_gpu.py
LINEAR := tests/ops/test_fp8_linear.py
EXCHANGE := tests/ops/test_all_to_all.py
MODEL := tests/nn/test_model_oracle.py
test312: .venv312/.tested
	.venv312/bin/python $(PYTEST) $(GPU) \
	  $(LINEAR)::test_linear_and_its_gradients_match_the_oracle \
	  "$(EXCHANGE)::test_equals_one_device[(2, 4)-two_hops-uneven]" \
	  "$(MODEL)::test_every_gradient_matches[isolated_deep]"

# What is long and of a claim that `make test` and `make test312` check more
# briefly, and what they run with one JAX with the other.
nightly: .venv/.clients .venv312/.tested
	$(BIN)/python $(PYTEST) -m nightly --durations=20 --ignore-glob='*_gpu.py'
	$(BIN)/python $(PYTEST) -m '' --durations=20 $(GPU)
	.venv312/bin/python $(PYTEST) -m nightly --durations=20 $(GPU)
	.venv312/bin/python $(PYTEST) -m '' --durations=20 \
	  --ignore-glob='*_gpu.py' --ignore-glob='*_tpu.py' \
	  tests/pallas $(LINEAR) $(EXCHANGE) $(MODEL)

# Compilers of absent hardware: XLA, Mosaic and ptxas for an H100, libtpu. 6 GB
# of wheels, and about an hour; nothing runs on a device.
RESULTS ?= runs/compiled
COMPILED := JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 \
  TPU_SKIP_MDS_QUERY=1 .venvcompiled/bin/python -m

.venvcompiled/.tested: constraints312.txt constraintscompiled.txt
	test -x .venvcompiled/bin/python || $(PYTHON312) -m venv .venvcompiled
	.venvcompiled/bin/pip install -q -c constraints312.txt \
	  -c constraintscompiled.txt 'jax[cuda13]' nvidia-cuda-nvdisasm libtpu \
	  $(PACKAGES312)
	touch $@

# The tests first; their last line goes below the table of the kernels.
compiled: .venvcompiled/.tested
	mkdir -p runs $(RESULTS)
	$(COMPILED) pytest -q -m compiled tests/pallas \
	  tests/benchmarks/test_compile_kernels.py tests/benchmarks/test_overlap.py \
	  >runs/compiled.txt || { cat runs/compiled.txt; exit 1; }
	tail -n 1 runs/compiled.txt
	cd $(RESULTS) && rm -f compiled_h100.md compiled_tpu.md overlap_h100.md
	$(COMPILED) benchmarks.compile_kernels_gpu --output=$(RESULTS)/compiled_h100.md
	printf '\nTests of `make compiled`: %s.\n' "$$(tail -n 1 runs/compiled.txt)" \
	  >>$(RESULTS)/compiled_h100.md
	$(COMPILED) benchmarks.compile_kernels_tpu --output=$(RESULTS)/compiled_tpu.md
	$(COMPILED) benchmarks.overlap --output=$(RESULTS)/overlap_h100.md

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
