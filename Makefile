# On a fresh machine with Python >= 3.10:
#
#   make lenet5                     train LeNet-5        (make lenet5 ARGS="--epochs 3 --activation relu --pool max")
#   make smoke                      run the most important tests
#   make test                       run all tests
#
# With an NVIDIA GPU:
#
#   make lenet5-cuda                train on it
#   make gpu-check                  all tests and benchmarks on it, in about eight minutes
#
# The first command creates .venv and installs the project into it.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin

.PHONY: lenet5 lenet5-cuda test smoke lint bench cuda-on-cpu check-kernels gpu-check dist check-dist clean

lenet5: $(VENV)/installed
	$(BIN)/python examples/lenet5.py $(ARGS)

lenet5-cuda: $(VENV)/installed-cuda
	$(BIN)/python examples/lenet5.py --device cuda $(ARGS)

test: $(VENV)/installed-test
	$(BIN)/python -m pytest $(ARGS)

# Gradients of every layer, fused against unfused steps, checkpoints, a training run, the command line, and the checks
# that nothing was forgotten for a new layer or kernel.
SMOKE := tests/test_places.py tests/test_checkpoint.py tests/test_gradients.py tests/kernels/test_fused.py \
	tests/test_commands.py

smoke: $(VENV)/installed-test
	HYPOTHESIS_PROFILE=smoke $(BIN)/python -m pytest -q -m "not gpu" $(SMOKE) $(ARGS)

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks $(or $(ARGS),train-step)

# The tests of the CUDA path with the real numba-cuda and its PTX run on the CPU: no GPU (docs/cuda.md).
cuda-on-cpu: $(VENV)/installed-test $(VENV)/installed-cuda
	TINYCNN_CUDA=cpu $(BIN)/python -m pytest -m gpu $(ARGS)

# Compiles the CUDA kernels to machine code and prints the registers and memory of each: no GPU.
check-kernels: $(VENV)/installed-cuda
	$(BIN)/python tools/check_kernels.py $(ARGS)

gpu-check: $(VENV)/installed-test $(VENV)/installed-cuda
	$(BIN)/python -m benchmarks.gpu $(ARGS)

# Wheel and sdist in dist/, with their metadata checked.
dist: $(VENV)/installed-release
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

# Installs both into empty environments outside the checkout and trains with them.
check-dist: dist
	$(BIN)/python tools/check_dist.py

# Compiled kernels are in the __pycache__ folders, unless NUMBA_CACHE_DIR is set.
clean:
	rm -rf $(VENV) dist .cuda_on_cpu .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find tinycnn tests benchmarks examples tools -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit("tinycnn needs Python >= 3.10, $(PYTHON) is " + sys.version.split()[0]) if sys.version_info < (3, 10) else None'
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { echo "could not create $(VENV); on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@touch $@

$(VENV)/installed: $(VENV)/created pyproject.toml
	@echo "installing tinycnn into $(VENV) (a minute on the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	@echo "installing the test tools into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

$(VENV)/installed-release: $(VENV)/installed
	@echo "installing the build tools into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[release]'
	@touch $@

# make CUDA=cuda12 ... for a driver that supports CUDA 12 only.
CUDA ?= cuda13

$(VENV)/installed-cuda: $(VENV)/installed
	@echo "installing the CUDA toolkit's packages into $(VENV) (about 450 MB)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(CUDA)]'
	@touch $@
