# Each target works as the first command after cloning; only make and Python 3.11 or newer are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# What needs the extra hf, and only make test-hf and make test-parity run.
NEED_HF := tests/hf tests/parity exo_toy/integrations

.DELETE_ON_ERROR:
.PHONY: install test test-slow test-hf test-parity reproduce reproduce-quick reproduce-full bench wheel clean

install: $(INSTALLED)

# .installing marks an installation that has begun; found at the start, it was interrupted, and what it left is removed.
# Older pip takes the constraints of the build environment from PIP_CONSTRAINT, newer pip from PIP_BUILD_CONSTRAINT.
$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON) found; name a Python >= 3.11: make PYTHON=/path/to/python3 install" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("make: Python >= 3.11 is needed, and $(PYTHON) is " + sys.version.split()[0] + "; name another: make PYTHON=/path/to/python3 install")'
	@if [ -e $(VENV)/.installing ]; then rm -rf $(VENV); fi
	@mkdir -p $(VENV) && rm -f $(INSTALLED) && touch $(VENV)/.installing
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --disable-pip-version-check -e '.[dask,figures,experiments,test]'
	@mv $(VENV)/.installing $(INSTALLED) && touch $(INSTALLED)

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto --dist worksteal -m "not slow" $(NEED_HF:%=--ignore=%)

test-slow: $(INSTALLED)
	$(BIN)/pytest -m slow $(NEED_HF:%=--ignore=%)
	HYPOTHESIS_PROFILE=nightly $(BIN)/pytest -n auto --dist worksteal -m "not slow" $(NEED_HF:%=--ignore=%)

# The integrations, with the extra that they need. Nothing is looked up on a hub.
test-hf: $(INSTALLED)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[hf]'
	HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/pytest -n auto --dist loadfile tests/hf exo_toy/integrations

# The losses against those of TRL's trainer; nothing is looked up on a hub.
test-parity: $(INSTALLED)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[hf]'
	HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/pytest tests/parity

reproduce: $(INSTALLED)
	$(BIN)/exo-toy reproduce

reproduce-quick: $(INSTALLED)
	$(BIN)/exo-toy reproduce --quick

reproduce-full: $(INSTALLED)
	$(BIN)/exo-toy reproduce --full

bench: $(INSTALLED)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench,hf]'
	$(BIN)/python -m benchmarks.policies
	$(BIN)/python -m benchmarks.finite_k
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.trainer
	$(BIN)/python -m benchmarks.automata

wheel: $(INSTALLED)
	$(BIN)/python -m build --no-isolation --wheel

clean:
	rm -rf build dist analysis/.cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
