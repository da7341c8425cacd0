# Everything runs in an environment that the first target builds. Nothing is needed beforehand but
# python3 (3.10 to 3.13) with pip and venv.
#
#   make quickstart          prune a small real model on the CPU
#   make test                the CPU test suite
#   make test-slow           the tests that take minutes and 10 GiB each
#   make venv PYTHON=python3.12 VENV=.venv312     another Python, beside the first

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2

# Threads that spin while they wait slow a busy machine down many times over.
export OMP_WAIT_POLICY ?= PASSIVE

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check
WHEEL_VENV := $(VENV)-wheel

.PHONY: venv quickstart test test-slow coverage lint format format-check types clean

venv: $(STAMP)

# torch comes first and by its exact version, so that an index that offers a CPU build of it is
# asked for that one before anything else can ask for a range. pip then finds it installed.
# DeepSpeed comes as source and brings what it needs to be built.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt setuptools
	$(PIP) install --quiet --constraint constraints.txt $(TORCH)
	$(PIP) install --quiet --constraint constraints.txt deepspeed
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev,demo]'
	touch $(STAMP)

quickstart: venv
	$(BIN)/python -m plprune.quickstart

test: venv
	$(BIN)/pytest -n $(WORKERS) -m "not slow"

test-slow: venv
	$(BIN)/pytest -m slow

# One process: lines reached in the children of a test are counted, those of test workers are not.
coverage: venv
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

lint: venv
	$(BIN)/ruff check

format: venv
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format

format-check: venv
	$(BIN)/ruff format --check

# What is checked is what is shipped: the wheel, installed in an environment of its own that sees
# the packages of the first one through a .pth file but not its editable plprune. mypy cannot follow
# the import hook of an editable install, and it must not start in the root of the repository, where
# the folder plprune/ would hide the installed package.
types: venv
	rm -rf build/wheel build/lib build/bdist.*
	$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	test -x $(WHEEL_VENV)/bin/python || $(BIN)/python -m venv --without-pip $(WHEEL_VENV)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> "$$($(WHEEL_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/packages.pth"
	$(PIP) --python $(WHEEL_VENV)/bin/python install --quiet --no-deps --no-index \
		--force-reinstall build/wheel/plprune-*.whl
	cd build/wheel && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml \
		--cache-dir $(CURDIR)/.mypy_cache \
		--python-executable $(abspath $(WHEEL_VENV))/bin/python -p plprune

clean:
	rm -rf $(VENV) $(WHEEL_VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache \
		.hypothesis .coverage .coverage.* htmlcov
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
