# make demo   compress, fine-tune, measure and draw a Segmenter (see README)
# make test   all tests that fit a CI run; make test-slow runs the others
# make coverage   branch coverage of those tests; make mutation, whether the
#                 tests of the core notice deliberate faults
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
REQUIREMENTS := $(wildcard requirements/*.txt) setup.py

.PHONY: demo test test-slow coverage mutation clean

demo: $(STAMP)
	$(BIN)/python tools/demo.py --work-dir work_dirs/demo

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

coverage: $(STAMP)
	$(BIN)/coverage erase
	$(BIN)/python -m pytest -m "not slow" --cov --cov-report=
	$(BIN)/coverage report

mutation: $(STAMP)
	$(BIN)/python tools/mutation_check.py

$(STAMP): $(REQUIREMENTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	"Python 3.10 or newer is needed: make PYTHON=python3.x")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar off torch torchvision
	$(BIN)/python -m pip install --progress-bar off \
	-r requirements/mminstall.txt -r requirements/tests.txt -e .
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info work_dirs
