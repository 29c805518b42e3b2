# make demo: the main job, start to end.  make test: linters and every test.
# Both make a virtual environment first, with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := setup.py CMakeLists.txt pyproject.toml constraints.txt $(wildcard csrc/*.h csrc/cpu/* csrc/cuda/*)
CPP := $(wildcard csrc/*.h csrc/cpu/* csrc/cuda/*)

.PHONY: demo test lint format bench clean

demo: $(VENV)/installed
	$(BIN)/placekern demo

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: $(VENV)/installed
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-columns=median,iqr,rounds -q

$(VENV)/installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info placekern/*.so
