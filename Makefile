# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN = $(VENV)/bin
RUN = $(CURDIR)/runs/digits_resnet-clutter-0.25

.PHONY: demo test test-slow endurance check lint types docs pictures format clean

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed  ## the main job on an embedded data set: pretrain, search, prune, fine-tune, compare
	$(BIN)/python train_agent.py --dataset clutter --pretrain-epochs 15 --keep-macs 0.25 --networks 80

test: $(VENV)/.installed  ## the fast tests
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow"

test-slow: $(VENV)/.installed  ## the tests that take longer, those that need ../shared included
	$(BIN)/python -m pip install --quiet --editable '.[dev,ray,flower]'
	$(BIN)/python -m pytest -q -m slow

endurance: $(VENV)/.installed  ## 20 kills a command, 10,000 hostile files a reader: hours
	PRUNEGRAPH_KILLS=$${PRUNEGRAPH_KILLS:-20} PRUNEGRAPH_PROFILE=endurance $(BIN)/python -m pytest -q -n 2 --timeout=0 --durations=30 \
		tests/integration/test_kill.py tests/integration/test_jobs.py tests/hostile

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.installed
	$(BIN)/mypy

docs: $(VENV)/.installed  ## the documentation, in build/docs; warnings are errors
	$(BIN)/python -m sphinx --quiet --fresh-env --fail-on-warning --keep-going docs build/docs

pictures: docs  ## the README's, of the run of make demo and of an example; needs Debian's chromium
	cp $(RUN)/plots/widths.png docs/pictures/widths.png
	cp docs/gallery/images/sphx_glr_05_compare_001.png docs/pictures/compare.png
	chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --no-first-run --disable-background-networking \
		--window-size=560,690 --screenshot=docs/pictures/page.png $(RUN)/report.html

check: lint types docs test  ## everything that a change must pass

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
