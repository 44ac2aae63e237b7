# Two commands do everything: `make demo` sets up and runs the main job on the embedded default,
# `make test` sets up and runs every check. Both can be repeated; both print what they do.

PYTHON ?= python3
# Any torch that pyproject.toml admits will do. PyTorch's own index has smaller builds for the CPU:
# make TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu' demo
TORCH ?= torch==2.13.0
DEMO_OUT ?= qexport-demo

VENV := .venv
BIN := $(VENV)/bin
# a stamp of its own for every choice of torch
STAMP := $(VENV)/.installed-$(shell echo '$(TORCH)' | cksum | cut -d' ' -f1)

.PHONY: browser demo test test-fast format lint types setup embedded clean help

help:
	@echo "make demo       set up, then merge, quantize and verify the embedded model into $(DEMO_OUT)/"
	@echo "make test       set up, then format check, lint, types and all tests, those in the real runtimes too"
	@echo "make test-fast  the same without the slow tests"
	@echo "make format     rewrite the code in the project's format"
	@echo "make embedded   train the embedded model and its adapter again (about half an hour)"
	@echo "make clean      remove $(VENV) and $(DEMO_OUT)/"

setup: $(STAMP)

# torch goes first and pinned: left to the resolver it may come with gigabytes of CUDA packages.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v <= (3, 13) or sys.exit("qexport needs Python 3.10 to 3.13; %s is %d.%d. Choose another: make PYTHON=python3.12 ..." % (sys.executable, *v))'
	@echo "== $(VENV): creating with $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bnb]'
	@touch $(STAMP)

demo: setup
	@echo "== qexport demo: merge, shard, quantize and verify the embedded model"
	$(BIN)/qexport demo -o $(DEMO_OUT)

# The report's page is tested in Chromium; where it cannot be installed those tests are skipped, saying so.
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null \
	  || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	       && echo "== chromium: installing" && apt-get -qq update \
	       && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium chromium-driver >/dev/null; } \
	  || echo "== chromium is not there: tests of the page are skipped"

test: lint types browser
	@echo "== tests"
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: lint types
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow'

lint: setup
	@echo "== format and lint"
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup
	@echo "== types"
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

embedded: setup
	$(BIN)/python -m calibration.make

clean:
	rm -rf $(VENV) $(DEMO_OUT)
