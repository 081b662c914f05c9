# edgec: `make demo` and `make test` set up all they need on a fresh machine.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := .venv-bench
# One thread per process: two cores are shared by two test workers.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help demo test quick peers bench lint format docs toolchains clean

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[report,bench,dev,gpu]"
	touch $(STAMP)

demo: $(STAMP)  ## train a small model on handwritten digits, compile it for this machine, run it
	$(BIN)/python -m edgec.demo

toolchains:  ## install cross compilers and emulators with apt where allowed
	@sh .ci/toolchains.sh

test: $(STAMP) toolchains lint  ## set up, then all linters and tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

quick: $(STAMP) lint  ## the linters and the tests that need no compiler (seven minutes on two cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not host and not cross and not qemu"

lint: $(STAMP)  ## formatting, style, types and import rules
	$(BIN)/ruff check edgec passes targets tests examples benchmarks
	$(BIN)/ruff format --check edgec passes targets tests examples benchmarks
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(STAMP)  ## rewrite files in the project's format
	$(BIN)/ruff check --fix edgec passes targets tests examples benchmarks
	$(BIN)/ruff format edgec passes targets tests examples benchmarks

# In a folder of their own: they come with pins that must not move those of the project.
$(PEERS)/.installed: benchmarks/peers.txt $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(PEERS) -r $<
	touch $@

peers: $(PEERS)/.installed  ## install the inference engines that the benchmark compares with, in .venv-bench

bench: $(STAMP) peers  ## print sizes and instruction counts, speed beside other engines, then accuracies of the shared models
	$(BIN)/python -W ignore -m benchmarks.instructions
	$(BIN)/python -W ignore -m benchmarks.cpu
	$(BIN)/python -W ignore -m benchmarks.results

docs: $(STAMP)  ## write docs/reference from the docstrings
	$(BIN)/python -m edgec.docs

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) $(PEERS) .pytest_cache .ruff_cache
