# Everything runs in a virtual environment of the checkout, made on first use from the pinned versions.
PYTHON ?= python3
BIN := .venv/bin
# Most of what is installed is never imported: what is, Python compiles when it is.
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

# An interpreter that is there already serves as well: make gpu OUT=folder BIN=/usr/bin
ENVIRONMENT := $(if $(filter .venv/bin,$(BIN)),.venv/installed)
RUN = PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(BIN)/python3

.PHONY: help compare gpu tune test test-gpu soak versions architectures executed accuracy equivalence pictures sanitize lint format clean

help:
	@echo "make compare   time SyncBN against what there is (on a GPU if there is one), into build/compare; ARGS='--help' for options"
	@echo "make gpu OUT=folder   on a machine with a GPU: its tests, the comparisons, tuning, into a folder; ARGS=--list"
	@echo "make tune      find configs for the GPU of this machine; ARGS='--resume --budget 30' goes on for half an hour"
	@echo "make test      run the tests that need no GPU; ARGS='tests/layer/test_accuracy.py --drawn 1000' draws so many cases"
	@echo "make test-gpu  run the tests that need one"
	@echo "make soak      train many layers for many steps in four processes"
	@echo "make versions  run the essentials on each Triton; ARGS='--torch 2.12.0' on a torch, ARGS='--python bin/python' where that is"
	@echo "make architectures   compile every kernel for every architecture: registers, spills, widths"
	@echo "make executed  execute what is compiled for each architecture; ARGS='--mutations 100' changes it: is it noticed?"
	@echo "make accuracy  write tests/ACCURACY.md"
	@echo "make equivalence   train a small segmentation on 1 to 8 processes: is it one result? ARGS='--seeds 3' for means"
	@echo "make pictures  draw errors where the mean is large, and bytes by formula, into docs/pictures"
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

compare: $(ENVIRONMENT)
	$(RUN) perf/compare.py --csv build/compare/rows.csv --plots build/compare $(ARGS)

gpu: $(ENVIRONMENT)
	@$(RUN) perf/on_gpu.py $(OUT) $(ARGS)

tune: $(ENVIRONMENT)
	$(RUN) perf/tune.py $(ARGS)

test: $(ENVIRONMENT)
	$(RUN) -m pytest --numprocesses 2 --dist loadfile $(ARGS)

test-gpu: $(ENVIRONMENT)
	$(RUN) -m pytest -m gpu $(ARGS)

soak: $(ENVIRONMENT)
	$(RUN) -m pytest tests/layer/test_soak.py --soak-steps 300 $(ARGS)

versions: $(ENVIRONMENT)
	$(RUN) -m tests.versions $(ARGS)

architectures: $(ENVIRONMENT)
	$(RUN) perf/architectures.py $(ARGS)

executed: $(ENVIRONMENT)
	$(RUN) -m tests.executed $(ARGS)

accuracy: $(ENVIRONMENT)
	$(RUN) perf/accuracy.py $(ARGS)

equivalence: $(ENVIRONMENT)
	$(RUN) perf/equivalence.py $(ARGS)

pictures: $(ENVIRONMENT)
	$(RUN) perf/cancellation.py --out docs/pictures
	$(RUN) perf/traffic.py --out docs/pictures

sanitize: $(ENVIRONMENT)
	for tool in memcheck racecheck; do \
		compute-sanitizer --tool $$tool --error-exitcode 1 \
			$(RUN) -m pytest -m gpu tests/kernels/test_kernels.py $(ARGS) || exit 1; \
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
