# Everything happens in .venv: Python >= 3.10 and make are all that a machine needs.
#
# A set of extras is installed once and noted in a stamp file inside .venv, so that removing .venv forgets all of them.
# The stamps are older than a changed pyproject.toml, and then the set-up runs again.

PYTHON ?= python3
SEED ?= 1
COUNT ?= 25
BIN := .venv/bin
QUICK := not faults and not docs and not examples
EXTRAS := quickstart dev docs everything
extras-quickstart := quickstart
extras-dev := dev
extras-docs := docs
extras-examples := dev,examples
extras-everything := dev,docs,translation

# Many tests start Python anew: compiled files of the project are kept, whatever the environment says.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test oldest translation faults gpu wheel docs docs-test examples lint format clean

help:  ## say what there is
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: .venv/everything.stamp  ## the whole environment, with all extras

quickstart: .venv/quickstart.stamp  ## train on handwritten digits with four strategies: a table and quickstart.png
	$(BIN)/python examples/quickstart.py

test: lint  ## lint, type-check, and run all tests but the slow ones, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "$(QUICK)"

oldest: .venv-oldest/dev.stamp  ## run the tests with the oldest versions that pyproject.toml allows
	.venv-oldest/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "$(QUICK)"

translation: .venv/everything.stamp  ## run the tests that need fairseq, which `make test` passes over without it
	$(BIN)/python -m pytest tests/recipes/test_translation.py tests/recipes/test_experiments.py

faults: .venv/dev.stamp  ## run the slow tests, then COUNT faults drawn from SEED: workers that die, wait and fail
	$(BIN)/python -m pytest -m faults
	$(BIN)/python -m tests.faults.campaign --seed $(SEED) --count $(COUNT)

gpu: .venv/dev.stamp  ## run what only a GPU can show, in four minutes on one card; skipped where there is none
	$(BIN)/python -m pytest -m gpu tests/gpu

# The folder is empty, so that what runs there is what was installed.
wheel: | $(BIN)/uv  ## build wheel and sdist, install them into an empty environment, and train the quickstart from there
	rm -rf dist .venv-wheel
	$(BIN)/uv build --out-dir dist
	$(BIN)/uv venv --python $(BIN)/python .venv-wheel
	$(BIN)/uv pip install --python .venv-wheel/bin/python --compile-bytecode "$$(ls $(CURDIR)/dist/*.whl)[recipes]"
	cp examples/quickstart.py .venv-wheel
	mkdir .venv-wheel/empty
	cd .venv-wheel/empty && ../bin/python ../quickstart.py
	cd .venv-wheel/empty && ../bin/slowmo-train experiment=digits/slowmo trainer.max_epochs=2
	cd .venv-wheel/empty && ../bin/slowmo-report outputs
	cd .venv-wheel/empty && ../bin/slowmo-plan --params 25.6e6 --step-ms 170 --workers 32 --bandwidth 1gbit
	$(BIN)/uv pip install --python .venv-wheel/bin/python --no-deps --reinstall dist/*.tar.gz
	cd .venv-wheel/empty && ../bin/slowmo-reproduce --list

docs: .venv/docs.stamp  ## build the site into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

docs-test: .venv-examples/examples.stamp  ## run every command and block of code in README and docs
	.venv-examples/bin/python -m pytest -m docs tests/docs

examples: .venv-examples/examples.stamp  ## run every file in examples/
	.venv-examples/bin/python -m pytest -m examples tests/examples

lint: .venv/dev.stamp  ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/dev.stamp  ## bring the code into the form that lint wants
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove the environments and what runs leave behind
	rm -rf .venv .venv-oldest .venv-wheel .venv-examples dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f quickstart.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# uv resolves and installs in a fraction of pip's time; it is itself installed into .venv.
# Bytecode is compiled once here: where PYTHONDONTWRITEBYTECODE is set, every process would otherwise compile torch anew.
$(BIN)/uv:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

$(EXTRAS:%=.venv/%.stamp): .venv/%.stamp: pyproject.toml | $(BIN)/uv
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --editable ".[$(extras-$*)]"
	@touch $@

# First the oldest versions of what the package itself needs; then the tools for the tests, which must leave these alone.
.venv-oldest/dev.stamp: pyproject.toml | $(BIN)/uv
	$(BIN)/uv venv --clear --python $(BIN)/python .venv-oldest
	$(BIN)/uv pip install --python .venv-oldest/bin/python --resolution lowest-direct --editable .
	$(BIN)/uv pip freeze --python .venv-oldest/bin/python --exclude-editable > .venv-oldest/oldest.txt
	$(BIN)/uv pip install --python .venv-oldest/bin/python --compile-bytecode --constraint .venv-oldest/oldest.txt \
		--editable ".[$(extras-dev)]"
	@touch $@

# Transformers imports torchaudio where there is one, and the one that comes with fairseq need not fit torch.
.venv-examples/examples.stamp: pyproject.toml | $(BIN)/uv
	$(BIN)/uv venv --clear --python $(BIN)/python .venv-examples
	$(BIN)/uv pip install --python .venv-examples/bin/python --compile-bytecode --editable ".[$(extras-examples)]"
	@touch $@
