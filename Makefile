# The README's two commands are `make demo` and `make test`. Both need only Python 3.10 or newer and make:
# they create .venv here, install into it, and run. `make help` lists the rest.
#
#   make test PYTHON=python3.12      another interpreter (after `make clean`)
#   make test ARGS="-k schedule -x"  more arguments for pytest

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# Every install is held to constraints.txt. Without it, pip may re-resolve torch to the newest CUDA build.
# No build isolation: what builds the sdists among our dependencies is pinned there too.
# No bytecode ahead of use: most modules are never imported (`time make .venv/.test`: 69 s instead of 126).
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt
# sdists are built as wheels: without this an older pip says twice that it will build them so.
export PIP_USE_PEP517 := 1
# One process a core, one thread each: the tests' tensors are too small for more (71 s instead of 260 s on 2 cores).
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical
# matplotlib would keep its font cache in the home directory; nothing here writes outside the project.
export MPLCONFIGDIR := $(CURDIR)/$(VENV)/matplotlib

.DEFAULT_GOAL := help
.PHONY: help demo test test-docs test-all test-browser lint format typecheck docs build clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 20

demo: $(VENV)/.demo  ## install what the demo needs and run it
	$(BIN)/clockwork-hooks demo $(ARGS)

test: $(VENV)/.test  ## install what the tests need and run all but the slow ones
	$(PYTEST) -m "not slow and not browser" $(ARGS)

test-docs: $(VENV)/.test  ## those of the fast tests that read the documentation and the benchmarks' results
	$(PYTEST) -m "not slow and not browser" tests/docs $(ARGS)

test-all: $(VENV)/.test  ## run every test that needs no browser, the slow ones too
	$(PYTEST) -m "not browser" $(ARGS)

test-browser: $(VENV)/.test $(VENV)/.docs  ## look at the HTML report and the site in headless Chromium (Debian: apt-get install chromium)
	$(PYTEST) -m browser tests/browser $(ARGS)

lint: $(VENV)/.test  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test  ## let ruff fix and format the files
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

typecheck: $(VENV)/.test  ## mypy --strict on the package
	$(BIN)/mypy

docs: $(VENV)/.docs  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

build: $(VENV)/.base  ## build the sdist and the wheel into dist/
	$(BIN)/python -m hatchling build

clean:  ## remove the environment and every build output
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

# Stamp files: an environment is installed again only when what it is made from has changed.
$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "clockwork_hooks needs Python 3.10 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.base: $(VENV)/.created constraints.txt Makefile
	$(INSTALL) setuptools hatchling editables
	@touch $@

$(VENV)/.demo: $(VENV)/.base pyproject.toml
	$(INSTALL) --no-build-isolation --editable '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.base pyproject.toml requirements-zoo.txt
	$(INSTALL) --no-build-isolation --editable '.[test]'
	$(INSTALL) --no-deps --requirement requirements-zoo.txt
	@touch $@

$(VENV)/.docs: $(VENV)/.base pyproject.toml
	$(INSTALL) --no-build-isolation --editable '.[docs]'
	@touch $@
