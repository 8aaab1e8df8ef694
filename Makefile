# make demo: set up and run the whole pipeline on the digits.   make test, make lint: what CI calls.
# make demo-memory: nine digits trained, the tenth added from 20 images without training.
# make quick: lint and the unit tests, while you work; costly properties on a fifth of their examples, or not at all.
# make docs: the site, in site/index.html.
PYTHON ?= $(or $(shell command -v python3.11),$(shell command -v python3.12),python3.11)
VENV   ?= .venv
BIN    := $(VENV)/bin
# torch goes first, by its pin, so that nothing later drags in another build of it.
# With a GPU, or to choose a build: make demo TORCH="torch==2.13.0 --index-url <the index of your CUDA>"
TORCH  ?= torch==2.13.0
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Processes side by side: one more than cores, since some of them wait (for ranks that start, to begin, at the end).
# The longest files are end to end, and go first.
CORES  ?= 2
BESIDE ?= $(shell expr $(CORES) + 1)
PYTEST := $(BIN)/python -m pytest -p tests.support.processor_time
export OMP_NUM_THREADS ?= 1
export PYTHONWARNINGS  ?= ignore::FutureWarning
# Bytecode is kept, or each of the tests' many processes compiles the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-memory quick test lint docs install partial clean

$(VENV)/.installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) $(TORCH)
	$(PIP) --constraint constraints.txt --editable ".[all,test,lint]"
	@touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/cnn2gnn run --config demo

demo-memory: install
	$(BIN)/python examples/memory_demo.py

# The linters use one core at a time, so they run next to the tests; their output comes after.
quick: install
	@$(MAKE) --no-print-directory lint > $(VENV)/lint.log 2>&1 & linters=$$!; \
	CNN2GNN_QUICK=1 $(PYTEST) tests/unit --numprocesses $(BESIDE) --dist worksteal -m "not thorough"; tests=$$?; \
	wait $$linters; linted=$$?; cat $(VENV)/lint.log; exit $$((tests | linted))

test: install
	$(PYTEST) tests/unit --numprocesses $(BESIDE) --dist worksteal
	$(PYTEST) tests/end_to_end tests/multiprocess --numprocesses $(BESIDE) --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) --constraint constraints.txt --editable ".[docs]"
	@touch $@

# Warnings are errors, and everything is read again: what was warned of once is not forgotten.
docs: $(VENV)/.docs
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet --fresh-env --write-all \
		--conf-dir docs/site --doctree-dir $(VENV)/.doctrees docs site
	@echo "site/index.html"

# Optional: faster crops of photographs, the same pixels. Needs a C compiler and libjpeg-turbo's header.
partial: install
	$(BIN)/python -m cnn2gnn_dist.data.images.partial build

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
