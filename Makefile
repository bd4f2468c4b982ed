# Every target works from a fresh clone: the environment is made first, where it is missing or its pins changed.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell cat constraints.txt pyproject.toml | sha256sum | cut -c1-16)

.PHONY: demo reports test check install seeds bench clean

install: $(STAMP)

$(STAMP): constraints.txt pyproject.toml
	@echo "Installing into $(VENV): once, a few minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -U pip setuptools wheel
	@$(BIN)/python -m pip install -q -c constraints.txt torch
	@DS_BUILD_OPS=0 $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@rm -f $(VENV)/.installed-*
	@touch $(STAMP)

demo: install
	$(BIN)/python train.py --config kd_llama.yaml

# The three reports that the README shows: a language model, a classifier, a student of 4-bit weights with its exports.
reports: install
	$(BIN)/python scripts/reports.py

# Much of the suite waits, for time-outs, ranks and servers: three processes on two cores, one thread each.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

# The README's table: the demo's student, alone and distilled, over three seeds.
seeds: install
	$(BIN)/python scripts/experiments/demo_seeds.py

bench: install
	$(BIN)/python scripts/bench/loss.py

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
