# make setup | demo | test | lint | format | types | docs | clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.onelabel-setup
CODE := onelabel configs imaging models tasks cluster orchestrator
SUBPACKAGES := $(filter-out onelabel,$(CODE))

.PHONY: setup demo test lint format types docs clean

setup: $(STAMP)

# torch first and alone: it is the large one, and its build (CPU or CUDA) follows from pip's own settings.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt "setuptools>=77"
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e ".[demo,test,dev]"
	touch $@

demo: setup
	$(BIN)/onelabel demo

# two at a time: tests that start Ray wait for processes to begin; a file's tests share what they start; in the order
# of folders: by their number of tests those that take minutes would come last, and one process wait for the other
test: setup
	@$(BIN)/python -m pytest -q -rs -n 2 --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy reads folders, not import hooks: links show it the folders as onelabel.*
types: setup
	rm -rf build/types && mkdir -p build/types/onelabel
	ln -s $(foreach file,__init__.py errors.py py.typed,$(CURDIR)/onelabel/$(file)) build/types/onelabel/
	ln -s $(addprefix $(CURDIR)/,$(SUBPACKAGES)) build/types/onelabel/
	$(BIN)/mypy build/types/onelabel

docs: setup
	mkdir -p build
	$(BIN)/python -m onelabel.configs.document > build/configuration.md && mv build/configuration.md docs/

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find $(CODE) tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
