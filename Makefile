# On a fresh machine, with nothing but Python and make: `make demo`, `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test test-all check bench bench-families clean
help:
	@echo "make demo      train, prune and measure a small network (two minutes on two cores)"
	@echo "make test      the test suite          make test-all  with the slow tests"
	@echo "make check     ruff, mypy, doctests, import directions"
	@echo "make bench     every benchmark; BENCH=name runs benchmarks/name.py"
	@echo "make bench-families  all techniques on one network at equal bytes, with a figure; MNIST=folder of its files"

.venv/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[demo]"
	touch $@

.venv/.test: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test,bench]"
	touch $@ .venv/.demo

demo: .venv/.demo
	$(BIN)/lightning-compress

test: .venv/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: .venv/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow or not slow"

check: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --import-mode=prepend --doctest-modules lightning_compress
	$(BIN)/python -m pytest tests/test_architecture.py

BENCH ?= $(basename $(notdir $(wildcard benchmarks/[a-z]*.py)))
bench: .venv/.test
	set -e; for name in $(BENCH); do $(BIN)/python benchmarks/$$name.py; done

MNIST ?= data/mnist
bench-families: .venv/.test
	$(BIN)/python benchmarks/families.py --data $(MNIST) --figure families.png

clean:
	rm -rf .venv dist build outputs multirun .pytest_cache .mypy_cache .ruff_cache
