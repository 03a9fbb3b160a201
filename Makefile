# Everything runs in a virtual environment of the checkout, made on first use from the pinned versions.
PYTHON ?= python3
BIN := .venv/bin
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help compare tune test test-gpu soak architectures accuracy sanitize lint format clean

help:
	@echo "make compare   time SyncBN against what there is (on a GPU if there is one); ARGS='--help' for options"
	@echo "make tune      find configs for the GPU of this machine; ARGS='--resume --budget 30' goes on for half an hour"
	@echo "make test      run the tests that need no GPU"
	@echo "make test-gpu  run the tests that need one"
	@echo "make soak      train many layers for many steps in four processes"
	@echo "make architectures   compile every kernel for every architecture: registers, spills, widths"
	@echo "make accuracy  write tests/ACCURACY.md; ARGS='--examples 1000' to check so many drawn cases"
	@echo "make sanitize  run the kernel tests on a GPU under compute-sanitizer"
	@echo "make lint      check style and types; make format to mend style"
	@echo "make clean     remove the virtual environment and build files"

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable '.[test]'
	@touch $@

.venv/linters: .venv/installed
	$(INSTALL) mypy pandas-stubs ruff types-tqdm
	@touch $@

compare: .venv/installed
	$(BIN)/python perf/compare.py $(ARGS)

tune: .venv/installed
	$(BIN)/python perf/tune.py --write $(ARGS)

test: .venv/installed
	$(BIN)/python -m pytest $(ARGS)

test-gpu: .venv/installed
	$(BIN)/python -m pytest -m gpu $(ARGS)

soak: .venv/installed
	$(BIN)/python -m pytest tests/test_soak.py --soak-steps 300 $(ARGS)

architectures: .venv/installed
	$(BIN)/python tests/architectures.py $(ARGS)

accuracy: .venv/installed
	$(BIN)/python tests/accuracy.py $(ARGS)

sanitize: .venv/installed
	for tool in memcheck racecheck; do \
		compute-sanitizer --tool $$tool --error-exitcode 1 \
			$(BIN)/python -m pytest -m gpu tests/test_kernels.py $(ARGS) || exit 1; \
	done

lint: .venv/linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
