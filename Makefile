# A habit's shorthand for developers; users need only install.py. PY is the environment that `python install.py --test` makes.
PY ?= .venv-dmm/bin/python

.PHONY: all format check test slow demo

all: format check test

format:
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

check:
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test:
	python install.py --test

slow:
	python install.py --test -m "slow and not gpu"

demo:
	python install.py --demo
