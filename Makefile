# Two commands on a fresh machine with Python >= 3.10:
#
#   make lenet5                     train LeNet-5        (make lenet5 ARGS="--epochs 3 --activation relu --pool max")
#   make test                       run the tests
#
# Both create .venv and install the project into it, once.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin

.PHONY: lenet5 test lint bench clean clean-kernels

lenet5: $(VENV)/installed
	$(BIN)/python examples/lenet5.py $(ARGS)

test: $(VENV)/installed-test
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.train_step $(ARGS)

clean-kernels:
	rm -rf tinycnn/kernels/__pycache__ tinycnn/data/__pycache__

clean: clean-kernels
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

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
