# Everything runs inside .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test stress check install clean
install: $(STAMP)

# torch first and alone: the pinned release is taken wherever pip is told to look for it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/aiodisagg demo

test: $(STAMP)
	$(BIN)/python -m pytest -q

# 50,000 (and 25,000 stricter) worlds; prints how far it is.
stress: $(STAMP)
	$(BIN)/python -m pytest -q -s -p no:cacheprovider tests/protocol/test_world.py --hypothesis-profile long

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
