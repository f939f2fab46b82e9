# Shortcuts for work on the package; CONTRIBUTING.md explains them.
PYTHON ?= .venv/bin/python

.PHONY: setup test test-fast check fix ci bench kernels-check
setup:
	python3 -m venv .venv
	.venv/bin/pip install -q -c constraints.txt -e ".[dev,gguf]"
test:
	$(PYTHON) -m pytest
test-fast:
	$(PYTHON) -m pytest -m "not slow"
check:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
fix:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
ci:
	.ci/run
bench:
	$(PYTHON) benchmarks/performance.py
kernels-check:
	$(PYTHON) tests/model/packed/kernels_check.py
