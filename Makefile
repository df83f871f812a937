# make demo   compress, fine-tune, measure and draw a Segmenter (see README)
# make test   all tests that fit a CI run; make test-slow runs the others
# make test-original, make test-oldest   other stacks, see docs/stacks.md
# make coverage   branch coverage of those tests; make mutation, whether the
#                 tests notice deliberate faults
PYTHON ?= python3
VENV ?= .venv
# forks or original: the OpenMMLab packages to install
STACK ?= forks
TORCH ?= torch torchvision
OLDEST_TORCH := torch==2.4.1 torchvision==0.19.1
# Test processes, one thread each (see tests/conftest.py)
JOBS ?= auto
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
STAMP := $(VENV)/.installed
REQUIREMENTS := $(wildcard requirements/*.txt) setup.py

.PHONY: demo test test-slow coverage mutation test-original test-oldest clean

demo: $(STAMP)
	$(BIN)/python tools/demo.py --work-dir work_dirs/demo

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST) -m "not slow"

test-slow: $(STAMP)
	$(PYTEST) -m slow

test-original:
	$(MAKE) test STACK=original VENV=.venv-original

test-oldest:
	$(MAKE) test VENV=.venv-oldest TORCH="$(OLDEST_TORCH)"

coverage: $(STAMP)
	$(BIN)/coverage erase
	$(PYTEST) -m "not slow" --cov --cov-report=
	$(BIN)/coverage report

mutation: $(STAMP)
	$(BIN)/python tools/lab/mutation_check.py

$(STAMP): $(REQUIREMENTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	"Python 3.10 or newer is needed: make PYTHON=python3.x")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar off $(TORCH)
	$(MAKE) install-$(STACK) VENV=$(VENV)
	$(BIN)/python -m pip install --progress-bar off \
	-r requirements/tests.txt -e .
	touch $@

.PHONY: install-forks install-original
install-forks:
	$(BIN)/python -m pip install --progress-bar off \
	-r requirements/mminstall.txt

install-original:
	$(BIN)/python -m pip install --progress-bar off \
	-r requirements/mmbuild-original.txt
	.ci/build_mmcv $(BIN)/python $(VENV)/wheels
	$(BIN)/python -m pip install --progress-bar off \
	--find-links $(VENV)/wheels -r requirements/mminstall-original.txt

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info work_dirs
