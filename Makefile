# make demo: train a sparse network on digits and write its pictures to demo/.
# make test: lint, types and the test suite, a process per core.  Both make .venv first.
# make test-newest: the test suite with a newer Python and the newest of everything, in .venv-newest.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
JOBS   ?= auto

# ArviZ 1.x needs 3.12.
PYTHON_NEWEST ?= $(shell for p in python3.14 python3.13 python3.12; do $$p -c '' 2>/dev/null && echo $$p && break; done)
VENV_NEWEST   ?= .venv-newest

.PHONY: demo test test-newest lint notebooks clean

demo: $(VENV)/.installed
	$(BIN)/bayes-svdo demo --out demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --cov --cov-report=term $(ARGS)

# Against the newest versions, without constraints.txt; for example ARGS=tests/analysis.
test-newest: $(VENV_NEWEST)/.tested
	OMP_NUM_THREADS=1 $(VENV_NEWEST)/bin/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

$(VENV_NEWEST)/.tested: pyproject.toml
	@test -n "$(PYTHON_NEWEST)" || { echo "Python 3.12 or newer is needed; set PYTHON_NEWEST=/path/to/python3.13" >&2; exit 1; }
	@$(PYTHON_NEWEST) -c 'import sys; sys.exit("Python 3.12 or newer is needed; set PYTHON_NEWEST=/path/to/python3.13") if sys.version_info < (3, 12) else None'
	$(PYTHON_NEWEST) -m venv $(VENV_NEWEST)
	$(VENV_NEWEST)/bin/python -m pip install --quiet --upgrade pip
	$(VENV_NEWEST)/bin/python -m pip install --quiet --upgrade --editable '.[test]' 'arviz>=1'
	touch $@

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: $(VENV)/.tested
	$(BIN)/python notebooks/execute.py

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV_NEWEST) demo runs
